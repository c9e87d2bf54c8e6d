"""A smaller image at the total cost of each method: where it does better, pages say so before anything else.

Results of earlier versions have no such rows; then the pages say that.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

from benchmarks.tables import LEVEL, flipped, method, smaller, table_head, table_row
from trio.measure.evaluation.results import COUNTED, OVERALL, Comparison, EvaluationResults, RowResult

UNKNOWN = (
    "Smaller images of equal *total* cost were not measured in these results: the rows of equal tokens cost less than "
    "the methods beside them."
)


def comparisons(results: EvaluationResults) -> dict[str, Comparison]:
    """By method: the row of equal cost minus it; without methods for which nothing costs as little."""
    found = {one.baseline: one for one in results.comparisons if results.row(one.row).control == "equal cost"}
    return {row.name: found[row.name] for row in results.methods if row.name in found}


def word(results: EvaluationResults) -> str:
    """``resize``, or ``average-pool`` where all images have one size."""
    rows = (row for row in results.rows if row.control in ("equal cost", "equal tokens", "size") and not row.refused)
    return next((smaller(row) for row in rows), "resize")


def sentence(results: EvaluationResults, methods: Container[str] | None = None) -> str:
    """Which methods a smaller image of equal cost is above.

    Args:
        results: of one model.
        methods: names; None: all.
    """
    found = {name: one for name, one in comparisons(results).items() if methods is None or name in methods}
    if not found:
        return UNKNOWN
    what = f"{word(results).capitalize()} at equal total cost"
    above = {name: one for name, one in found.items() if one.difference.mean > 0}
    clear = [_said(name, one) for name, one in above.items() if one.p_holm < LEVEL]
    rest = [_said(name, one) for name, one in above.items() if one.p_holm >= LEVEL]
    if not above:
        return f"{what} is above none of the methods here ({len(found)})."
    parts = [f"**{what} is significantly above** {'; '.join(clear)}."] if clear else []
    if rest:
        parts.append(f"**{what} is above, not significantly,** {'; '.join(rest)}.")
    return " ".join(parts)


def _said(name: str, one: Comparison) -> str:
    return f"{name} by {one.difference.signed()}"


def by_model(
    tested: Sequence[EvaluationResults], methods: Callable[[EvaluationResults], Container[str]]
) -> Iterator[str]:
    """A line a model, and one for all whose results have no rows of equal cost.

    Args:
        tested: results, one of each model.
        methods: names of the methods that are spoken of.
    """
    lacking = []
    for results in tested:
        if comparisons(results):
            yield f"- **{results.model['name']}**: {sentence(results, methods(results))}"
        else:
            lacking.append(results.model["name"])
    if lacking:
        names = ", ".join(lacking)
        yield f"- Not measured in the committed results of {names}: their rows of equal *tokens* cost less."


def section(results: EvaluationResults) -> Iterator[str]:
    """The page's first section: the sentence, methods beside equal cost, and the curve of smaller images."""
    yield "## At equal total cost\n"
    yield f"{sentence(results)}\n"
    found = comparisons(results)
    if found:
        yield (
            f"Each method minus {word(results)} of equal total cost (vision tower, scoring, language model and\n"
            "decoding, counted), in points; a star: p < 0.05 (Holm).\n"
        )
        yield from _by_budget(found)
    sizes = [row for row in results.rows if row.control == "size" and not row.refused]
    if sizes:
        yield f"The full model, images made smaller by {word(results)}:\n"
        yield from _curve(results, sizes)


def _by_budget(found: dict[str, Comparison]) -> Iterator[str]:
    budgets = list(dict.fromkeys(_budget(name) for name in found))
    cells: dict[str, dict[str, str]] = {}
    for name, one in found.items():
        star = " *" if one.p_holm < LEVEL else ""
        cells.setdefault(method(name), {})[_budget(name)] = f"{flipped(one)}{star}"
    yield table_head(["", *budgets])
    for name, row in cells.items():
        yield table_row([name, *(row.get(budget, "") for budget in budgets)])
    yield ""


def _budget(name: str) -> str:
    return name.removeprefix(method(name)).removeprefix(", ")


def _curve(results: EvaluationResults, sizes: list[RowResult]) -> Iterator[str]:
    yield table_head(["", "visual tokens", "GFLOPs an answer", "of the full model's cost", "accuracy"])
    full = results.row("full")
    for row in (full, *sorted(sizes, key=lambda row: -(row.answer_flops or 0))):
        cost = "" if row.answer_flops is None else f"{row.answer_flops / 1e9:.3g}"
        share = cost_share(results, row)
        kind = COUNTED if COUNTED in row.accuracy else OVERALL
        name = "everything" if row is full else row.name
        cells = [f"{row.average:.1f}", cost, "" if share is None else f"{share:.0f}%", str(row.accuracy[kind])]
        yield table_row([name, *cells])
    yield ""


def cost_share(results: EvaluationResults, row: RowResult) -> float | None:
    """Total cost of an answer in percent of the full model's; None where it was not counted."""
    full = results.row("full").answer_flops
    return None if full is None or row.answer_flops is None else 100 * row.answer_flops / full
