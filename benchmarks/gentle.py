"""Gentle budgets: what is lost against the full model, and whether it is shown to be less than half a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.answers import counted, right
from benchmarks.readme import defaults
from benchmarks.tables import LEVEL, method, smaller, table_head, table_row
from trio.measure.evaluation.results import EvaluationResults, RowResult
from trio.measure.statistics import Bootstrap, Estimate, needed_scenes, paired

#: The loss that is to be shown not to be reached, in points.
GOAL = 0.5
BUDGETS = ("75", "50", "33")
METHODS = ("engine-divprune", "divprune")
LEGEND = (
    f"Each row minus the full model, in points, on the same questions. **held**: shown to lose less than {GOAL:g}\n"
    "points (one-sided test over scenes, 5% for each cell, not corrected for their number); **missed**: the interval\n"
    f"lies below -{GOAL:g}; open: neither."
)


@dataclass(frozen=True)
class Loss:
    """A row minus the full model.

    Attributes:
        gap: in points.
        p: one-sided, of losing `GOAL` or more.
        scenes: that would give the test a power of 90%, were nothing lost.
    """

    gap: Estimate
    p: float
    scenes: int

    @property
    def verdict(self) -> str:
        """``held``, ``missed`` or ``open``."""
        if self.p < LEVEL:
            return "**held**"
        return "**missed**" if self.gap.high < -GOAL else "open"


def loss(results: EvaluationResults, row: RowResult) -> Loss:
    """A row against the full model, on the sub-tasks that count for it."""
    gap, chosen = right(results, row) - right(results, results.row("full")), counted(results, row)
    bootstrap = Bootstrap(results.questions["scene"])
    test = paired(*bootstrap.by_scene(gap, chosen))
    points = bootstrap.number(gap, chosen).scaled(100, 3)
    return Loss(points, test.p_inferior(GOAL / 100), needed_scenes(test, GOAL / 100, tests=1))


def losses(results: EvaluationResults, budgets: Sequence[str] = BUDGETS) -> dict[str, dict[str, Loss]]:
    """By method and budget: the default, compressors alone, and what costs as much as the default."""
    rows = {row.name: row for row in results.rows if not row.refused}
    names = [method(next(iter(defaults(results).values())).name), *METHODS]
    found = {name: {b: rows[f"{name}, {b}%"] for b in budgets if f"{name}, {b}%" in rows} for name in names}
    equal = {budget: rows[row.equal_cost] for budget, row in found[names[0]].items() if row.equal_cost in rows}
    if equal:
        found[f"{smaller(next(iter(equal.values())))}, equal cost with {names[0]}"] = equal
    return {name: {b: loss(results, row) for b, row in by.items()} for name, by in found.items() if by}


def table(models: Sequence[EvaluationResults], budgets: Sequence[str] = BUDGETS) -> Iterator[str]:
    """A row a model and method, a column a budget that was measured; then what the number of scenes was good for."""
    needed: list[int] = []
    lost = {results.model["name"]: losses(results, budgets) for results in models}
    measured = [b for b in budgets if any(b in found for by_name in lost.values() for found in by_name.values())]
    yield table_head(["model", "", *(f"{budget}% kept" for budget in measured)])
    for model, by_name in lost.items():
        for name, found in by_name.items():
            cells = (f"{found[b].gap.signed()} {found[b].verdict}" if b in found else "" for b in measured)
            yield table_row([model, name, *cells])
            needed += [one.scenes for one in found.values()]
    scenes = ", ".join(str(results.task["scenes"]) for results in models)
    if needed:
        yield ""
        yield (
            f"Scenes: {scenes}. Were nothing lost, {min(needed):,} to {max(needed):,} scenes, by cell, would show it\n"
            "nine times of ten."
        )
