"""Promise 7: nothing is lost silently."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...core.upstream import MASK, Role, cache_of, keywords
from ...errors import BudgetError, NonFiniteError, SpecError
from ..bench import ONE, Bench, Setting, reduced
from ..results import Case, require
from .identity import bitwise
from .refusals import refusal


def cases(bench: Bench) -> Iterator[Case]:
    """Numbers that are not finite, stages and counts that do not fit, and what the report says."""
    layers = len(bench.adapter.layers)
    yield "pixels that are not finite", partial(_not_finite, bench)
    yield "a stage after the last layer", partial(_spec, bench, [{"after_layer": layers, "keep": 1}], str(layers))
    growing = [{"after_layer": 0, "keep": 4}, {"after_layer": 1, "keep": 8}]
    yield "counts that grow", partial(_spec, bench, growing, "keep")
    yield "fewer tokens than the count, if_fewer: error", partial(_fewer_error, bench)
    yield "fewer tokens than the count, if_fewer: keep-all", partial(_fewer_kept, bench)
    yield "the report counts every token", partial(_counts, bench)


def _not_finite(bench: Bench) -> str:
    inputs = bench.inputs(ONE)
    broken = {n: v * float("nan") if v.is_floating_point() else v for n, v in inputs.items()}
    with bench.pipeline():
        expected = bench.forward(inputs)
        message = refusal(NonFiniteError, "finite", lambda: bench.forward(broken))
        bitwise(bench.forward(inputs), expected)
    return message


def _spec(bench: Bench, stages: list[dict[str, Any]], says: str) -> str:
    return refusal(SpecError, says, lambda: bench.pipeline(Setting("wrong", stages)))


def _too_many(policy: str) -> Setting:
    return Setting(policy, ({"after_layer": 1, "keep": 1_000_000, "if_fewer": policy, "scorer": "random"},))


def _fewer_error(bench: Bench) -> str:
    with bench.pipeline(_too_many("error")):
        return refusal(BudgetError, "1000000", lambda: bench.forward(bench.inputs(ONE)))


def _fewer_kept(bench: Bench) -> str:
    inputs = bench.inputs(ONE)
    stock = bench.forward(inputs)
    pipeline = bench.pipeline(_too_many("keep-all"))
    with pipeline:
        ours = bench.forward(inputs)
    report = pipeline.report
    notes = report.samples[0].stages[0].groups[0].notes
    require(report.retention == 1, f"kept {report.retention:.1%}")
    require(bool(notes), "the report does not note that all tokens were kept")
    return f"{bitwise(ours, stock)}; the report says {notes[0]!r}"


def _counts(bench: Bench) -> str:
    inputs = bench.inputs(ONE)
    pipeline = bench.pipeline()
    with pipeline, torch.no_grad():
        out = bench.model(**inputs, **keywords({Role.USE_CACHE: True}))
    report = reduced(pipeline.report)
    sample = report.samples[0]
    text = int(inputs[MASK].sum()) - report.visual_tokens - sample.newlines
    pairs = zip(sample.visual_by_layer(report.num_layers), sample.newlines_by_layer(report.num_layers), strict=True)
    held = [layer.keys.shape[-2] for layer in cache_of(out).layers[: report.num_layers]]
    expected = [text + visual + newlines for visual, newlines in pairs]
    require(report.layer_tokens[0] == expected, f"layer_tokens {report.layer_tokens[0]}, expected {expected}")
    full = [bench.adapter.window(layer) is None for layer in range(report.num_layers)]
    wrong = [n for n, whole in enumerate(full) if whole and held[n] != expected[n]]
    require(not wrong, f"the cache holds {held} keys by layer, expected {expected}")
    return f"keys in the cache by layer: {held}"
