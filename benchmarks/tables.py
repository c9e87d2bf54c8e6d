"""What the results page and the README's table share: budgets, words for differences, Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trio.measure.evaluation.results import Comparison, EvaluationResults, RowResult

LEVEL = 0.05


def method(name: str) -> str:
    """A spec's name without its budget: ``visionzip`` of ``visionzip, 33%``."""
    return re.sub(r", [\d.]+%$", "", name)


def budgets(results: EvaluationResults) -> Iterator[tuple[RowResult, list[RowResult]]]:
    """The default of each budget, with the methods that are compared with it, itself first."""
    others = {one.row: one.baseline for one in results.comparisons if not results.row(one.row).control}
    for base in results.methods:
        if base.name not in others:
            yield base, [base, *(one for one in results.methods if others.get(one.name) == base.name)]


def flipped(one: Comparison) -> str:
    """A floor minus a method as the method minus the floor."""
    gap = one.difference
    return f"{-gap.mean:+z.1f} ({-gap.high:+z.1f} to {-gap.low:+z.1f})"


def table_row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def table_head(cells: Sequence[str]) -> str:
    """The first two lines of a table: words on the left, numbers on the right."""
    return f"{table_row(cells)}\n{table_row(['---'] + ['---:'] * (len(cells) - 1))}"
