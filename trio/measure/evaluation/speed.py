"""How fast each row is: all rows take turns on one batch, so that what else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..answering import wait
from .results import Speed
from .rows import EvaluationRow
from .runner import Runner

__all__ = ["measure"]

#: Questions in the batch that is timed.
BATCH = 8


def measure(runner: Runner, rows: Sequence[EvaluationRow], rounds: int) -> dict[str, Speed]:
    """Medians over rounds, by the rows' names in tables; the first round is not counted.

    Args:
        runner: model and task.
        rows: rows that are not refused; of several draws the first is measured, and a grey or wrong image is not.
        rounds: how many; 0: nothing is measured.
    """
    chosen = {row.group: row for row in reversed(rows) if row.image in ("own", "small", "resized")}
    if rounds < 1:
        return {}
    batch = runner.batches[(len(runner.batches) - 1) // 2][:BATCH]
    samples = [runner.task.samples[i] for i in batch]
    pipelines = {name: runner.pipeline(row) if row.spec is not None else None for name, row in chosen.items()}
    inputs: dict[str, Any] = {}
    for name, row in chosen.items():
        images = runner.shown.images(samples, row.image, row.tokens)
        prompts = [([image], sample.question) for image, sample in zip(images, samples, strict=True)]
        inputs[name] = runner.inputs(prompts, row)
    seconds: dict[tuple[str, int], list[float]] = {}
    lengths = (1, runner.task.max_new_tokens)
    for _ in range(rounds + 1):
        for name in reversed(chosen):
            for length in lengths:
                wait(runner.model.device)
                begin = time.perf_counter()
                runner.generate(inputs[name], samples, pipelines[name], length)
                wait(runner.model.device)
                seconds.setdefault((name, length), []).append(time.perf_counter() - begin)
    medians = {key: median(taken[1:]) for key, taken in seconds.items()}
    return {
        name: Speed(
            first_token=medians[name, lengths[0]], answer=medians[name, lengths[1]], rounds=rounds, batch=len(batch)
        )
        for name in reversed(chosen)
    }
