"""The README's short table, from the results of `trio eval`; `python -m benchmarks.results` writes it.

The default is the first spec of the results file. The other methods are looked up by name in each of its budgets: a row
that the file does not have is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import equal_cost
from benchmarks.answers import first_layer
from benchmarks.tables import LEVEL, budgets, flipped, method, table_head, table_row
from trio.measure.evaluation.results import COUNTED, OVERALL, EvaluationResults, RowResult
from trio.measure.evaluation.rows import none_name

BEGIN, END = "<!-- results: python -m benchmarks.results -->", "<!-- end of results -->"
MODEL = "tiny-llava"
#: Methods beside the default.
METHODS = (
    "TRIO (released)",
    "TRIO (paper)",
    "diversity only",
    "trio-soft with top-k",
    "engine-divprune",
    "divprune",
    "visionzip",
    "uniform-grid",
)
Found = dict[str, RowResult | None]


def block(results: EvaluationResults) -> str:
    """The block with the lines that mark it.

    Args:
        results: of the model that the README shows.
    """
    bases = defaults(results)
    rows = list(_rows(results, bases))
    task, total = results.task, results.model["visual_tokens"]
    lines = [
        BEGIN,
        "",
        f"{task['questions']} questions about {task['scenes']} drawn scenes that the zoo's trained "
        f"`{results.model['name']}` has never seen: percent",
        "answered right, with 95% intervals bootstrapped over scenes. What is kept is averaged over the layers; the",
        "first row is the default. It shows how the methods compare on a small model, and ranks nothing else",
        "([every method, control and model](docs/results.md)).",
        *_counted(results, [one for _, found in rows for one in found.values() if one is not None]),
        "",
        equal_cost.sentence(results, default_names(results)),
        "",
        table_head(["kept", *(f"{share}: {base.average:.1f} of {total}" for share, base in bases.items())]),
        *(table_row([label, *(_cell(found[share]) for share in bases)]) for label, found in rows),
        "",
        *_gain(results, bases),
        "",
        END,
    ]
    return "\n".join(lines)


def defaults(results: EvaluationResults) -> dict[str, RowResult]:
    """The default's rows by their budget, as its specs' names give it: ``33%`` of ``trio-soft (ours), 33%``."""
    bases = [base for base, _ in budgets(results)]
    name = method(bases[0].name)
    return {base.name.removeprefix(f"{name}, "): base for base in bases if method(base.name) == name}


def default_names(results: EvaluationResults) -> set[str]:
    """Names of the default's rows."""
    return {base.name for base in defaults(results).values()}


def _rows(results: EvaluationResults, bases: dict[str, RowResult]) -> Iterator[tuple[str, Found]]:
    """Label, and the row of each budget; rows that no budget has are left out."""
    by_name = {one.name: one for one in results.rows}

    def controls(control: str) -> Found:
        return {share: results.control(control, base.schedule) for share, base in bases.items()}

    def named(name: str) -> Found:
        return {share: by_name.get(f"{name}, {share}") for share in bases}

    default, random = method(next(iter(bases.values())).name), controls("random")
    draws = max(len(one.draws) for one in random.values() if one is not None)
    nothing = {share: by_name.get(none_name(first_layer(base))) for share, base in bases.items()}
    found = [
        *((_label(name, named(name)), named(name)) for name in dict.fromkeys((default, *METHODS))),
        ("uniform grid, at the default's layers", controls("uniform")),
        (f"random, at the default's layers (mean of {draws} draws)", random),
        (f"{equal_cost.word(results)}, equal cost", {s: by_name.get(base.equal_cost) for s, base in bases.items()}),
        (f"{equal_cost.word(results)}, equal tokens", controls("equal tokens")),
        ("oracle, at the default's layers", controls("oracle")),
        ("nothing, from the default's first layer", nothing),
        ("no image", controls("no image")),
        ("everything", controls("full")),
    ]
    return ((label, cells) for label, cells in found if any(cells.values()))


def _label(name: str, cells: Found) -> str:
    """Whether the method works on the encoder side alone is said beside its name."""
    specs = [one.spec for one in cells.values() if one is not None and one.spec is not None]
    alone = any(spec.get("compressor") and not spec.get("stages") for spec in specs)
    return f"{name} (compressor)" if alone else name


def _cell(one: RowResult | None) -> str:
    if one is None:
        return ""
    return "not applicable" if one.refused else str(one.accuracy.get(COUNTED, one.accuracy.get(OVERALL)))


def _counted(results: EvaluationResults, rows: list[RowResult]) -> Iterator[str]:
    """Which sub-tasks the accuracies are over, where not all of them count."""
    firsts = {first_layer(one) for one in rows if one.schedule}
    kinds = {
        first: tuple(gate.kind for gate in results.gates if gate.first == first and gate.passes) for first in firsts
    }
    if len(set(kinds.values())) > 1:
        yield "Sub-tasks count that pass the validity gate at a row's first layer: not the same ones in all rows."
    elif set(kinds.values()) != {tuple(results.kinds)}:
        number = len(next(iter(kinds.values())))
        yield f"Of {len(results.kinds)} sub-tasks, the {number} that pass the validity gate count."


def _gain(results: EvaluationResults, bases: dict[str, RowResult]) -> Iterator[str]:
    """The default against random tokens at the smallest budget, in a sentence."""
    share, base = min(bases.items(), key=lambda item: item[1].average or 0.0)
    random = results.control("random", base.schedule)
    for one in results.comparisons:
        if random is not None and (one.row, one.baseline) == (random.name, base.name):
            side = "above" if one.difference.mean < 0 else "**below**"
            said = f"significantly {side}" if one.p_holm < LEVEL else "not told apart from"
            yield f"At {share} the default is {said} random tokens with the same counts at the same layers:"
            yield f"{flipped(one)} points on the same questions."
