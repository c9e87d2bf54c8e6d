"""The page about towers and the models of one's own, run as written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from test_examples import run_page

import trio
from trio.encoders.towers.base import TOWERS

ROOT = Path(__file__).parent.parent


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    TOWERS.names()
    for attribute in ("_parts", "_aliases", "_sources"):
        monkeypatch.setattr(TOWERS, attribute, dict(getattr(TOWERS, attribute)))
    names: dict[str, object] = {"__name__": "docs_towers"}
    torch.manual_seed(0)
    assert run_page(ROOT / "docs" / "towers.md", names) == 6
    first = names["first"]
    assert isinstance(first, trio.encoders.compressors.base.VisualTokens)
    assert first.features.shape == (64, 384) and len(first.merge_map) == 196
    shown = capsys.readouterr().out
    assert "[ok]" in shown and "FAILED" not in shown


@pytest.mark.parametrize(("name", "counts"), [("open_clip_vlm", [196, 64]), ("timm_vlm", [256, 64, 64])])
def test_models_of_ones_own_run_compressed(name: str, counts: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]() == counts
    lines = capsys.readouterr().out.splitlines()
    answers = [line.rpartition("answer ")[2] for line in lines if "answer" in line]
    assert len(set(answers)) == len(answers) == len(counts), "compressed features changed nothing"
