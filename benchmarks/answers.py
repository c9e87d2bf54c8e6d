"""Answers of rows as numbers, and the sub-tasks that count for them."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from trio.measure.evaluation.results import EvaluationResults, RowResult


def right(results: EvaluationResults, row: RowResult) -> NDArray[np.float64]:
    """Which questions a row answers right, float64 ``(questions,)``; of random the mean of its draws."""
    draws = [np.asarray([character == "1" for character in results.right[name]], float) for name in row.draws]
    mean: NDArray[np.float64] = np.mean(draws, axis=0)
    return mean


def first_layer(row: RowResult) -> int:
    """Layers before the first reduction of a row of a schedule, as the schedule's label says."""
    found = re.search(r"after (\d+)", row.schedule)
    assert found is not None, row.schedule
    return int(found[1])


def counted(results: EvaluationResults, row: RowResult) -> NDArray[np.bool_]:
    """The questions that count for a row, bool ``(questions,)``: of sub-tasks that pass the gate at its first layer.

    All where none passes, as in results without gates.
    """
    first = first_layer(row) if row.schedule else 0
    kinds = [gate.kind for gate in results.gates if gate.first == first and gate.passes] or results.kinds
    chosen: NDArray[np.bool_] = np.isin(results.questions["kind"], kinds)
    return chosen
