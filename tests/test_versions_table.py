"""Promises by release: what `make versions` measures and writes."""

from __future__ import annotations

import pytest

from benchmarks import versions
from trio.core import upstream
from trio.testing import PROMISES


def test_a_family_is_measured_with_every_promise(monkeypatch):
    monkeypatch.setattr(versions, "families", lambda: ["llava"])
    data = versions.measure()
    assert data["transformers"] == upstream.version()
    found = data["families"]["llava"]
    assert set(found["checks"]) == set(PROMISES) and found["broken"] == []
    assert all(held == made > 0 for held, made in found["checks"].values())


def test_every_family_that_has_a_tiny_model_is_measured():
    assert {"llava", "qwen2_5_vl", "ernie4_5_vl_moe", "video_llava"} <= set(versions.families())


def test_the_committed_results_are_in_the_table():
    found = versions.load()
    table = versions.table(found)
    assert len(found) >= 8
    for data in found:
        assert f"| {data['transformers']} |" in table
    page = (versions.RESULTS.parent.parent / "docs" / "support.md").read_text(encoding="utf-8")
    assert table in page


@pytest.mark.parametrize("held", [1, 2])
def test_what_does_not_hold_is_bold_and_listed(held):
    checks = {"identity": [held, 2]}
    family = {"checks": checks, "broken": [] if held == 2 else ["[FAILED] identity: other logits"]}
    data = [{"transformers": "5.99.0", "families": {"llava": family, "gone": None}}]
    assert ("**1 of 2**" in versions.table(data)) is (held == 1)
    assert len(versions.broken(data)) == 2 - held
