"""A scorer, a selector, a compressor and a family from outside, each one file: counted, tuned, listed, evaluated."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import trio
from trio import zoo
from trio.adapters import adapter_for, families
from trio.adapters.base import ADAPTERS
from trio.cli import app
from trio.cost import predict, published_shape, shape_of
from trio.encoders.compressors.base import COMPRESSORS
from trio.measure import evaluation
from trio.measure.tuning.space import Space
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS

EXAMPLES = Path(trio.__file__).parent.parent / "examples"
#: By file: the registry, the name, the parameter that a search varies, and a spec that has the part.
STAGE = {"after_layer": 2, "keep": 10}
FILES: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "my_scorer": (SCORERS, "contrast", "prompt_weight", {"stages": [{**STAGE, "scorer": "contrast"}]}),
    "my_selector": (SELECTORS, "cells", "cells", {"stages": [{**STAGE, "selector": "cells"}]}),
    "my_compressor": (COMPRESSORS, "top-and-rest", "layer", {"compressor": {"name": "top-and-rest", "keep": 10}}),
}


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file registers is forgotten after the test."""
    for registry in (SCORERS, SELECTORS, COMPRESSORS, ADAPTERS):
        registry.names()
        for attribute in ("_parts", "_aliases", "_sources"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))


@pytest.fixture(params=FILES)
def part(request: pytest.FixtureRequest) -> tuple[Any, str, str, dict[str, Any]]:
    runpy.run_path(str(EXAMPLES / f"{request.param}.py"), run_name=request.param)
    registry, name, parameter, spec = FILES[request.param]
    return registry, name, parameter, {"version": 1, "name": "mine", **spec}


def evaluated(model: Any, processor: Any, spec: dict[str, Any], out: Path) -> Any:
    """The row of a spec in an evaluation of one scene."""
    task = evaluation.shapesvqa(limit=1)
    results = evaluation.evaluate(model, processor, task, [spec], out=out, batch_size=16, speed_rounds=0)
    return results.row("mine")


def test_a_part_from_outside_is_counted(part: tuple[Any, str, str, dict[str, Any]]) -> None:
    *_, name, _, spec = part
    shape = published_shape("llava-1.5-7b")
    made = predict(spec, shape, images=(576,), text_tokens=60)
    assert made.notes == []
    if name == "top-and-rest":
        projected = 2 * (1024 * 4096 + 4096 * 4096)
        assert made.compressed.flops.compression == 2 * 577 * 1024 + projected


def test_a_part_from_outside_is_tuned(part: tuple[Any, str, str, dict[str, Any]]) -> None:
    registry, name, parameter, _ = part
    space = Space.of(adapter_for(zoo.load("tiny-llava")[0]))
    assert name in {SCORERS: space.scorers, SELECTORS: space.selectors, COMPRESSORS: space.compressors}[registry]
    assert set(registry.get(name).search_space()) == {parameter}


def test_a_part_from_outside_is_listed(part: tuple[Any, str, str, dict[str, Any]]) -> None:
    _, name, parameter, _ = part
    result = CliRunner().invoke(app, ["list", name, "--json"])
    assert result.exit_code == 0, result.stderr
    assert name in result.stdout and parameter in result.stdout


def test_a_part_from_outside_is_evaluated(part: tuple[Any, str, str, dict[str, Any]], tmp_path: Path) -> None:
    row = evaluated(*zoo.load("tiny-llava"), part[3], tmp_path)
    assert not row.refused and row.flops > 0 and row.average < 144


def test_a_family_from_outside_is_counted_shown_and_evaluated(tmp_path: Path) -> None:
    """A ViP-LLaVA of random weights for the processor of the bundled model; `check_adapter`: tests/test_examples.py."""
    adapter = runpy.run_path(str(EXAMPLES / "my_adapter.py"), run_name="my_adapter")["VipLlavaAdapter"]
    stock, processor = zoo.load("tiny-llava")
    config = transformers.VipLlavaConfig(
        text_config=stock.config.text_config,
        vision_config=stock.config.vision_config,
        image_token_index=stock.config.image_token_id,
        vision_feature_layers=[-2, -1],
    )
    torch.manual_seed(0)
    model: Any = transformers.VipLlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = stock.generation_config.eos_token_id
    assert families()["vipllava"] is adapter and type(adapter_for(model)) is adapter
    assert shape_of(config).projector[0] == (
        2 * config.vision_config.hidden_size,
        config.text_config.hidden_size,
    )

    folder = tmp_path / "model"
    config.save_pretrained(folder)
    result = CliRunner().invoke(app, ["show", "trio-soft-11", "--model", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["cost"]["full"]["flops"]["tower"] > 0

    spec = {"version": 1, "name": "mine", "stages": [{**STAGE, "scorer": "last-token-attention"}]}
    row = evaluated(model, processor, spec, tmp_path / "out")
    assert not row.refused and row.flops > 0 and 10 < row.average < 144
