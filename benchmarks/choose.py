"""The blocks of docs/choose-a-spec.md, from committed results; ``python -m benchmarks.results`` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import equal_cost, gentle
from benchmarks.readme import default_names, defaults
from benchmarks.tables import LEVEL, flipped, method, table_head, table_row
from trio.measure.evaluation.results import COUNTED, OVERALL, EvaluationResults, RowResult

#: The default for engines, without its budget.
ENGINE = "engine-divprune"


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: python -m benchmarks.results -->", f"<!-- end of {name} -->"


def blocks(folder: Path) -> dict[str, str]:
    """The blocks by name, with the lines that mark them.

    Args:
        folder: with the results files.
    """

    def load(kind: str) -> list[EvaluationResults]:
        return [EvaluationResults.load(file) for file in sorted(folder.glob(f"{kind}-*.json"))]

    tested = load("eval")
    made = {
        "equal cost": _equal_cost(tested),
        "engine": _engine(load("engine"), tested),
        "gentle budgets": _gentle(tested),
        "budgets": _budgets(tested),
    }
    return {name: "\n".join([marks(name)[0], "", *lines, "", marks(name)[1]]) for name, lines in made.items()}


def _equal_cost(tested: Sequence[EvaluationResults]) -> Iterator[str]:
    """A row a model and budget: the default beside a smaller image of equal total cost; first where that is better."""
    yield from equal_cost.by_model(tested, default_names)
    measured = [results for results in tested if equal_cost.comparisons(results)]
    if not measured:
        return
    yield ""
    yield table_head(["model", "default", "total cost", "accuracy", "equal cost", "its accuracy", "default minus it"])
    for results in measured:
        found = equal_cost.comparisons(results)
        for base in defaults(results).values():
            if base.name not in found:
                continue
            row, one = results.row(base.equal_cost), found[base.name]
            share = equal_cost.cost_share(results, base)
            yield table_row(
                [
                    results.model["name"],
                    base.name,
                    "" if share is None else f"{share:.0f}%",
                    _accuracy(base),
                    row.name.partition(",")[0],
                    _accuracy(row),
                    flipped(one) + (" *" if one.p_holm < LEVEL else ""),
                ]
            )


def _accuracy(row: RowResult) -> str:
    return str(row.accuracy.get(COUNTED, row.accuracy[OVERALL]))


def _engine(chosen: Sequence[EvaluationResults], tested: Sequence[EvaluationResults]) -> Iterator[str]:
    """How the compressor was chosen, and how it does on test scenes."""
    if chosen:
        yield from _choice(chosen)
        yield ""
    rows = []
    for results in tested:
        by_name = {row.name: row for row in results.methods if not row.refused}
        for share, base in defaults(results).items():
            served = by_name.get(f"{ENGINE}, {share}")
            if served is not None:
                one = next((c for c in results.comparisons if (c.row, c.baseline) == (served.name, base.name)), None)
                gap = "" if one is None else one.difference.signed() + (" *" if one.p_holm < LEVEL else "")
                rows.append([results.model["name"], share, _accuracy(served), _accuracy(base), gap])
    if rows:
        yield "On test scenes, beside the default (which no engine can run):\n"
        yield table_head(["model", "kept", f"`{ENGINE}-*`", "`trio-soft-*`", "difference"])
        yield from (table_row(row) for row in rows)
    else:
        yield "It is not judged on test scenes yet: the committed results are older than it."


def _choice(chosen: Sequence[EvaluationResults]) -> Iterator[str]:
    """By compressor and budget, the worst over the models of what is lost against the full model."""
    worst: dict[str, dict[str, float]] = {}
    for results in chosen:
        full = results.row("full").accuracy[OVERALL].mean
        for row in results.methods:
            share = row.name.removeprefix(f"{method(row.name)}, ")
            lost = row.accuracy[OVERALL].mean - full
            by_share = worst.setdefault(method(row.name), {})
            by_share[share] = min(lost, by_share.get(share, lost))
    shares = list(dict.fromkeys(share for by_share in worst.values() for share in by_share))
    asked = " and ".join(f"`{one.model['name']}` ({one.task['questions']} questions)" for one in chosen)
    yield (
        f"Chosen on validation scenes of {asked}: accuracy minus the full model's in points, the worse of the models,\n"
        "each compressor alone, as vLLM numbers its tokens.\n"
    )
    yield table_head(["compressor", *(f"{share} kept" for share in shares)])
    ordered = sorted(worst.items(), key=lambda item: -item[1][shares[-1]])
    for name, by_share in ordered:
        yield table_row([f"`{name}`", *(f"{by_share[share]:+.1f}" for share in shares)])


def _gentle(tested: Sequence[EvaluationResults]) -> Iterator[str]:
    yield f"{gentle.LEGEND}\n"
    yield from gentle.table(tested)


def _budgets(tested: Sequence[EvaluationResults]) -> Iterator[str]:
    """The default and what is left without a method, by model and budget."""
    shares = list(dict.fromkeys(share for results in tested for share in defaults(results)))
    yield table_head(["model", "", *(f"{share} kept" for share in shares), "everything"])
    for results in tested:
        bases = defaults(results)
        random = {share: results.control("random", base.schedule) for share, base in bases.items()}
        full = _accuracy(results.row("full"))
        for name, found in ((f"`{_spec(bases)}-*`", bases), ("random tokens", random)):
            cells = (_accuracy(row) if (row := found.get(share)) is not None else "" for share in shares)
            yield table_row([results.model["name"], name, *cells, full])


def _spec(bases: dict[str, RowResult]) -> str:
    """The default's name as specs have it: ``trio-soft`` of ``trio-soft (ours), 11%``."""
    return method(next(iter(bases.values())).name).partition(" ")[0]
