"""Quantised weights as they were measured: the page says it, and messages promise no more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import quantised
from trio.adapters.quantised import WORKING, advice


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(quantised.RESULT.read_text())
    return data


def test_the_page_shows_what_was_measured(found: dict[str, Any]) -> None:
    page = quantised.RESULT.parents[2] / "docs" / "support.md"
    assert quantised.page(found) in page.read_text(encoding="utf-8")
    assert [row["kind"] for row in found["rows"]] == [kind.name for kind in quantised.KINDS]


def test_packed_weights_of_4_bits_are_told_what_to_set() -> None:
    """On some CPUs bitsandbytes nf4 gives no gradients: the advice must not name it without saying more."""
    assert "support_avx512bf16_for_cpu" in advice("bitsandbytes 4bit, Params4bit, uint8", as_they_come=False)
    assert "support_avx512bf16_for_cpu" not in advice("torchao Int8WeightOnlyConfig", as_they_come=False)


def test_what_messages_advise_was_found_to_work(found: dict[str, Any]) -> None:
    rows = {row["kind"]: row for row in found["rows"]}
    for name in WORKING:
        row = rows[name]
        same, tokens = (55, 0.5) if name == "bitsandbytes nf4" else (58, 0.85)  # four bits: other tokens, near answers
        assert not row["refused"]
        assert min(row["same_full"], row["same_compressed"]) >= same and row["same_tokens"] >= tokens
        exact = {promise for promise, (held, made) in row["checks"].items() if held == made > 0}
        half = {"batch"} if name == "bitsandbytes int8" else set()  # activations in float16, see the page
        assert exact == set(quantised.CHECKED) - half
    assert "dynamic-activation int8" in rows["torchao int8, dynamic activations"]["refused"]
