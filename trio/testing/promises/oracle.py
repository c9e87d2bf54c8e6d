"""The runtime against an oracle that shares no code with it: the stock model, dropped tokens hidden or left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...core.prompts import Inputs, Prompt, Side
from ...report import CompressionReport
from ..bench import RAGGED, Bench, Setting, extended, reduced, relative
from ..oracle import compact_logits, kept_columns, masked_logits, merged_features
from ..results import Case, require
from ..stock import first_entry


@dataclass(frozen=True)
class Compressed:
    """What a pipeline gave for a batch.

    Attributes:
        inputs: of the batch.
        side: where its padding is.
        compact: whether survivors were renumbered.
        report: of the prefill.
        entered: what entered the first decoder layer, ``(B, S', D)``, where a compressor may have merged.
        prefill: logits ``(B, S'', vocabulary)``.
        sequences: the inputs with the generated tokens, ``(B, S + steps)``; without any, the inputs.
        steps: logits of the generated tokens, ``(B, steps, vocabulary)``, or None.
    """

    inputs: Inputs
    side: Side
    compact: bool
    report: CompressionReport
    entered: torch.Tensor | None
    prefill: torch.Tensor
    sequences: torch.Tensor
    steps: torch.Tensor | None = None


def cases(bench: Bench) -> Iterator[Case]:
    """Every setting on a ragged batch: prefill and decoded steps, and a prefill padded on the right."""
    for setting in bench.settings:
        yield f"{setting.label}, prefill and decoded steps", partial(_agrees, bench, setting, "left")
        yield f"{setting.label}, prefill padded on the right", partial(_agrees, bench, setting, "right")


def _agrees(bench: Bench, setting: Setting, side: Side) -> str:
    return agreement(bench, compressed(bench, setting, RAGGED, side))


def compressed(bench: Bench, setting: Setting, prompts: Sequence[Prompt], side: Side = "left") -> Compressed:
    """Runs a batch through a pipeline: all rows of a prefill and, where it is padded on the left, generation."""
    inputs = bench.inputs(*prompts, side=side)
    pipeline = bench.pipeline(setting)
    with pipeline, first_entry(bench.adapter) as entered:
        prefill = bench.forward(inputs)
        report = reduced(pipeline.report)
        run = Compressed(
            inputs=inputs,
            side=side,
            compact=pipeline.positions == "compact",
            report=report,
            entered=entered[0] if setting.compressor is not None else None,
            prefill=prefill,
            sequences=inputs["input_ids"],
        )
        if side == "right":
            return run
        with pipeline.replay(report):  # in half precision generation's own positions may break a tie differently
            out = bench.generate(inputs)
    return replace(run, sequences=out.sequences[:, :-1], steps=torch.stack(out.logits, dim=1))


def agreement(bench: Bench, run: Compressed) -> str:
    """Compares every surviving row of the prefill and every decoded step with the oracle.

    Raises:
        AssertionError: they differ by more than a tenth of the bench's tolerance (in half precision: by more than the
            tolerance, or than twice what eager attention changes on the stock model).
    """
    strict = replace(bench, tolerance=_allowed(bench, run))
    expected = oracle(bench, run)
    steps = 0 if run.steps is None else run.steps.shape[1]
    generated = run.sequences.shape[1] - run.inputs["input_ids"].shape[1]
    rows = [len(sample) - generated for sample in expected]
    require(
        run.prefill.shape[1] == max(rows), f"the prefill gave {run.prefill.shape[1]} rows of logits, not {max(rows)}"
    )
    worst = 0.0
    for sample, (logits, count) in enumerate(zip(expected, rows, strict=True)):
        own = run.prefill[sample, :count] if run.side == "right" else run.prefill[sample, -count:]
        worst = max(worst, strict.close(own, logits[:count], f"sample {sample}, prefill"))
        for step in range(steps):
            assert run.steps is not None
            actual, right = run.steps[sample, step], logits[count - 1 + step]
            worst = max(worst, strict.close(actual, right, f"sample {sample}, step {step} of generation"))
    form = "renumbered, layer by layer" if run.compact else "hidden as keys"
    return f"{sum(rows)} rows of logits and {steps} steps, {form}, largest error {worst:.1e}"


def _allowed(bench: Bench, run: Compressed) -> float:
    if bench.exact:
        return bench.tolerance / 10  # the same tokens are summed up in the same number format
    eager = masked_logits(bench.model, bench.adapter, run.inputs, {})
    return max(bench.tolerance, 2 * relative(eager, bench.forward(run.inputs)))


def oracle(bench: Bench, run: Compressed) -> list[torch.Tensor]:
    """For each sample the oracle's logits at the tokens that reach the last layer, ``(n, vocabulary)``."""
    model, adapter = bench.model, bench.adapter
    whole = extended(run.inputs, run.sequences)
    kept = kept_columns(model, adapter, whole, run.report)
    features = None if run.entered is None else merged_features(model, adapter, whole, run.report, run.entered)
    if run.compact:
        return compact_logits(model, adapter, whole, kept, features=features)
    logits = masked_logits(model, adapter, whole, kept, features=features)
    return [row[mask] for row, mask in zip(logits, kept[max(kept)], strict=True)]
