"""What each part of the method is good for: paired differences between two rows that differ in that part alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.answers import right
from benchmarks.tables import LEVEL, method, table_head, table_row
from trio.measure.evaluation.results import EvaluationResults, RowResult
from trio.measure.statistics import Bootstrap, Estimate, holm, paired

RANDOM = "random"
"""In place of a method: the random control of the other's schedule."""


@dataclass(frozen=True)
class Pair:
    """Two rows, and what the first minus the second says."""

    what: str
    first: str
    second: str


PAIRS = (
    Pair("the default over random tokens", "trio-soft (ours)", RANDOM),
    Pair("the default over the published parts and schedule", "trio-soft (ours)", "TRIO (paper)"),
    Pair("published parts and schedule over random tokens", "TRIO (paper)", RANDOM),
    Pair("saliency alone (top-k) over random tokens", "trio-soft with top-k", RANDOM),
    Pair("saliency over diversity alone", "trio-soft (ours)", "diversity only"),
    Pair(
        "gradient over attention (top-k after layer 1)",
        "objective-gradient + top-k after layer 1",
        "last-token-attention + top-k after layer 1",
    ),
    Pair("attention over random tokens", "last-token-attention + top-k after layer 1", RANDOM),
    Pair("nms over top-k", "trio-soft with nms", "trio-soft with top-k"),
    Pair("soft-nms over nms", "trio-soft (ours)", "trio-soft with nms"),
    Pair("a second stage over one at the input", "trio-soft (ours)", "trio-soft at the input"),
    Pair("16 rows of the text behind the image over the prompt's last 4", "trio-soft (ours)", "last 4 rows"),
    Pair("the question's own words over those with the template's", "the question's own words", "trio-soft (ours)"),
    Pair("rows to the prompt's end over those as released", "last 4 rows", "last 4 rows, as released"),
    Pair("a spread over the image over features alone", "trio-soft (ours)", "soft-nms, spread 0.0"),
    Pair("original over renumbered positions", "trio-soft (ours)", "renumbered positions"),
    Pair("two stages over three", "trio-soft (ours)", "three stages"),
)


def findings(results: EvaluationResults, budgets: Sequence[str] = ("33", "22", "11")) -> Iterator[str]:
    """The lines of a table, a row a pair that the results have; none where they have none.

    Args:
        results: of one model.
        budgets: as they end the names of specs: ``visionzip, 33%``.
    """
    rows = {(method(row.name), budget): row for row in results.methods for budget in budgets if _at(row, budget)}
    bootstrap = Bootstrap(results.questions["scene"])
    cells: dict[tuple[str, str], Estimate] = {}
    p_values: dict[str, float] = {}
    for pair in PAIRS:
        for budget in budgets:
            first = rows.get((pair.first, budget))
            second = rows.get((pair.second, budget))
            if pair.second == RANDOM and first is not None:
                second = results.control(RANDOM, first.schedule)
            if first is None or second is None or second.refused:
                continue
            chosen = np.isin(results.questions["kind"], _counted(results, first, second))
            gap = right(results, first) - right(results, second)
            found = bootstrap.difference(gap, np.zeros_like(gap), chosen)
            cells[pair.what, budget] = Estimate(mean=100 * found.mean, low=100 * found.low, high=100 * found.high)
            p_values[f"{pair.what}/{budget}"] = paired(*bootstrap.by_scene(gap, chosen)).p
    corrected = holm(p_values)
    if not cells:
        return
    yield table_head(["points gained by", *(f"{budget}%" for budget in budgets)])
    for what in dict.fromkeys(what for what, _ in cells):
        shown = []
        for budget in budgets:
            cell = cells.get((what, budget))
            star = " *" if cell is not None and corrected[f"{what}/{budget}"] < LEVEL else ""
            shown.append("" if cell is None else cell.signed() + star)
        yield table_row([what, *shown])


def _at(row: RowResult, budget: str) -> bool:
    return row.name.endswith(f", {budget}%")


def _counted(results: EvaluationResults, *rows: RowResult) -> list[str]:
    """Sub-tasks that pass the gate for all rows; all where none does."""
    kinds = set(results.kinds)
    for one in results.comparisons:
        if one.row in {row.name for row in rows}:
            kinds &= set(one.kinds)
    return [kind for kind in results.kinds if kind in kinds] or results.kinds
