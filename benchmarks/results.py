"""``docs/results.md``, the pages below ``docs/results/`` and the README's table; sentences follow from the numbers.

``python -m benchmarks.results`` reads ``benchmarks/results/eval-*.json`` (methods) and ``parts-*.json`` (the default
with its parts varied): what `benchmarks.evaluate` wrote, or the ``results.json`` of any `trio eval` under such a name.
Blocks of docs/choose-a-spec.md are made as well, by `benchmarks.choose`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import choose, equal_cost, figures, gentle
from benchmarks.findings import findings
from benchmarks.readme import MODEL, block, default_names
from benchmarks.tables import LEVEL, budgets, flipped, method, shown_name, table_head, table_row, write_block
from trio.measure.evaluation import wording
from trio.measure.evaluation.results import COUNTED, OVERALL, Comparison, EvaluationResults, RowResult

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class ResultKind:
    """One kind of results files.

    Attributes:
        option: of `benchmarks.evaluate`.
        contents: for the list of tables.
        pivot: title of the short table; empty: there is none.
        section: title of the long tables.
    """

    option: str
    contents: str
    pivot: str
    section: str


#: By the begin of a file's name, in the order in which they are shown.
KINDS = {
    "eval": ResultKind("", "all methods and controls", "Every method against the default", "Methods and controls"),
    "parts": ResultKind(
        " --parts",
        "the default part by part, on validation scenes",
        "The default with one part varied",
        "The default, part by part",
    ),
}
#: So few comparisons that show nothing are named in the short text.
NAMED = 3

HEAD = """# Results: what the methods keep, on the small models of the zoo

<!-- Written by `python -m benchmarks.results`; do not edit. -->

[ShapesVQA](shapesvqa.md) version 1, asked of the zoo's models by the protocol of [`trio eval`](evaluation.md). It shows
that the code works and how methods compare **on these small models and drawn scenes**; it ranks nothing else. No
checkpoint of the hub was run.

## In short
"""

READ = """## How to read the tables

- **accuracy**: percent of questions answered right, over the sub-tasks that pass the validity gate; **retained**:
  percent of (accuracy - no image) / (full - no image). Intervals are 95%, bootstrapped over scenes.
- **- random**, **- default**: paired differences in points from random tokens (the mean of five draws) with the same
  counts at the same layers, and from the first method of the table. A star: p < 0.05 by a sign-flip test over scenes,
  Holm-corrected over the comparisons of the table.
- **default non-inferior**: whether the default is shown to be not worse than the row by the margin (one-sided, 5%,
  Holm-corrected); in brackets the power of that test here were both alike, and the scenes that would give 90%.
- **above**, **BELOW**: where the default stands against a method, significantly (Holm); **non-inferior**: it is shown
  to be not worse by the margin; **open**: neither is shown.
- **oracle** keeps the tokens of the things asked about; **resize** is what a user could do instead, a smaller image,
  and **average-pool** stands for it where the model takes images of one size: at **equal cost** its whole answer
  (vision tower, scoring, language model, decoding) costs as much as the method's, at **equal tokens** it has as many
  tokens and costs less. **none** drops all visual tokens where the table's first reduction stands.
- **GFLOPs**: of a whole answer, or, in results of earlier versions (which have no rows of equal cost), of a prefill.
"""


def pages(files: Sequence[Path]) -> dict[str, str]:
    """The short page and a page a model, by their paths below ``docs``.

    Args:
        files: results, in the order in which they are shown.
    """
    found = [(file, EvaluationResults.load(file)) for file in files]
    made = {"results.md": _short(found)}
    for name in dict.fromkeys(results.model["name"] for _, results in found):
        made[f"results/{name}.md"] = _of_model(name, [one for one in found if one[1].model["name"] == name])
    return made


def _short(found: Sequence[tuple[Path, EvaluationResults]]) -> str:
    """Figures, a sentence a model, where the tables are, and how to read them."""
    lines = [HEAD]
    if not found:
        return "\n".join([*lines, "No results have been committed yet."]) + "\n"
    tested = [results for file, results in found if _kind(file) == "eval"]
    lines += [
        *_first(tested),
        "How the default (trio-soft, the first row of each table) does against the other methods, by budget, on\n"
        "the same questions, of the sub-tasks that pass the [validity gate](evaluation.md#the-validity-gate).\n",
        *(_in_a_line(results) for results in tested),
        "",
        "![Accuracy by the share of visual tokens kept, a panel a model](results/accuracy.png)\n",
        "Questions answered right by the share of the visual tokens that is kept, averaged over the layers, with 95%\n"
        "intervals. *random* (at the default's layers), *resize* and *average-pool* are what a user has without a\n"
        "method; at *equal cost* they stand at the share of the default that costs as much.\n",
        "![Every method minus the default at the smallest budget, a panel a model](results/differences.png)\n",
        "Every method beside the default at the smallest budget: what it gains (right of the line) or loses on the\n"
        "same questions, in points, with 95% intervals. Filled: significant (Holm).\n",
        "## The tables\n",
        table_head(["model", "questions", "scenes", "tables"]),
    ]
    for name in dict.fromkeys(results.model["name"] for _, results in found):
        of_model = [(file, results) for file, results in found if results.model["name"] == name]
        what = [_part_of_page(file) for file, _ in of_model]
        numbers = [", ".join(str(results.task[key]) for _, results in of_model) for key in ("questions", "scenes")]
        lines.append(table_row([f"[{name}](results/{name}.md)", *numbers, "; ".join(what)]))
    lines += [
        "",
        "The numbers stand in `benchmarks/results/`; `python -m benchmarks.results` makes the pages and figures of\n"
        "them, and tests compare the two. Each page gives the command that makes its results anew.\n",
        READ,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _part_of_page(file: Path) -> str:
    return KINDS[_kind(file)].contents


def _first(tested: Sequence[EvaluationResults]) -> Iterator[str]:
    """What a smaller image of equal total cost does, before anything else."""
    yield "Against a smaller image (average-pool where images have one size) of equal *total* cost, the default:\n"
    yield from equal_cost.by_model(tested, default_names)
    yield ""
    if "results/cost.png" in figures.plotted(tested):
        yield "![Accuracy by the total cost of an answer, a panel a model](results/cost.png)\n"
        yield (
            "Questions answered right by the FLOPs of a whole answer (tower, scoring, language model, decoding)\n"
            "in percent of the full model's. The dashed line is what a method has to be above: the full model on\n"
            "smaller images, or with averaged features where images have one size.\n"
        )
        lacking = [one.model["name"] for one in tested if not any(row.control == "size" for row in one.rows)]
        if lacking:
            yield f"That line was not measured for {', '.join(lacking)}.\n"


def _of_model(name: str, found: Sequence[tuple[Path, EvaluationResults]]) -> str:
    """All tables of a model."""
    lines = [
        f"# Results of {name}\n",
        "<!-- Written by `python -m benchmarks.results`; do not edit. -->\n",
        "Differences from the default of the same budget, in points, on the same questions. "
        "[How to read the tables](../results.md#how-to-read-the-tables).\n",
    ]
    for file, results in found:
        if _kind(file) == "eval":
            lines += [*equal_cost.section(results), *_gentle(results)]
    for file, results in found:
        what = KINDS[_kind(file)].pivot
        lines += [f"## {what}\n", f"{results.task['questions']} questions.\n", *_pivot(results), *_power(results)]
    lines += _findings(found)
    for file, results in found:
        lines += _section(file, results)
    return "\n".join(lines).rstrip() + "\n"


def _gentle(results: EvaluationResults) -> Iterator[str]:
    yield "## Gentle budgets\n"
    yield f"{gentle.LEGEND}\n"
    yield from gentle.table([results])
    yield ""


def measured() -> list[Path]:
    """The committed results: methods, then parts, each model by model."""
    return [file for kind in KINDS for file in sorted(RESULTS.glob(f"{kind}-*.json"))]


def _in_a_line(results: EvaluationResults) -> str:
    """To how many methods the default is shown to be non-inferior, and above or below how many it stands."""
    verdicts = {one.row: verdict(one) for one in results.comparisons if not results.row(one.row).control}
    said = list(verdicts.values())
    shown, above, below = (sum(word in one for one in said) for word in ("non-inferior", "above", "BELOW"))
    others = [name for name, one in verdicts.items() if "non-inferior" not in one]
    named = f", all but {' and '.join(others)}" if 0 < len(others) <= NAMED else ""
    every, margin = "all" if shown == len(said) else f"{shown} of", results.settings["margin"]
    return (
        f"- **{results.model['name']}**, {results.task['scenes']} scenes: non-inferior by {margin:g} point in {every} "
        f"{len(said)} comparisons (methods times budgets){named}; significantly above in {above}, below in {below}."
    )


def _pivot(results: EvaluationResults) -> Iterator[str]:
    """A row a method, a column a budget."""
    compared = [one for one in results.comparisons if not results.row(one.row).control]
    baselines = list(dict.fromkeys(one.baseline for one in compared))
    cells: dict[str, dict[str, str]] = {}
    for one in compared:
        cells.setdefault(method(one.row), {})[one.baseline] = f"{one.difference.signed()} {verdict(one)}"
    yield table_head(["", *(f"against {budget}" for budget in baselines)])
    for name, found in cells.items():
        yield table_row([name, *(found.get(budget, "") for budget in baselines)])
    yield ""


def _power(results: EvaluationResults) -> Iterator[str]:
    """What the number of scenes was good for."""
    compared = [one for one in results.comparisons if not results.row(one.row).control]
    if not compared:
        return
    scenes = sorted(one.scenes_for_90 for one in compared)
    power = sorted(one.power for one in compared)
    yield (
        f"{results.task['scenes']} scenes give the non-inferiority test at {compared[0].margin:g} point a power of "
        f"{100 * power[0]:.0f} to {100 * power[-1]:.0f}% where two methods are alike; 90% would take {scenes[0]:,} to "
        f"{scenes[-1]:,} scenes, by comparison.\n"
    )


def _findings(found: Sequence[tuple[Path, EvaluationResults]]) -> Iterator[str]:
    """What each part is good for."""
    tables = [(file, results, list(findings(results))) for file, results in found]
    if not any(lines for *_, lines in tables):
        return
    yield "## What each part is good for\n"
    yield (
        "Differences between two rows that differ in that part alone, in points, on the same questions; a star: "
        "p < 0.05 by sign flips over scenes, Holm-corrected over the table. The rows stand in the sections below.\n"
    )
    for file, results, lines in tables:
        if lines:
            chosen = _kind(file) != "eval"
            split = "split validation, for choosing" if chosen else f"split {results.task['split']}"
            yield f"{results.task['questions']} questions, {split}.\n"
            yield from [*lines, ""]


def _kind(file: Path) -> str:
    return file.name.partition("-")[0]


def verdict(one: Comparison) -> str:
    """What a comparison says about its baseline."""
    said = []
    if one.p_holm < LEVEL:
        said.append("above" if one.difference.mean < 0 else "BELOW")
    if one.p_baseline_inferior_holm < LEVEL:
        said.append("non-inferior")
    return ", ".join(said) or "open"


def _section(file: Path, results: EvaluationResults) -> Iterator[str]:
    model, task = results.model, results.task
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    kind = KINDS[_kind(file)]
    yield f"## {kind.section}\n"
    yield (
        f"{task['questions']} questions on {task['scenes']} scenes (split {task['split']}, {task['canvas']} images, "
        f"sha256 `{task['sha256'][:12]}`); {model['visual_tokens']} visual tokens, {model['layers']} layers, "
        f"{model['dtype']}; {versions}; weights `{model['weights'][:12]}`.\n"
    )
    yield f"    python -m benchmarks.evaluate {model['name']} --scenes {task['scenes']}{kind.option}\n"
    yield from _gates(results)
    for base, rows in budgets(results):
        yield from _budget(results, base, rows)
    yield from _by_kind(results)
    yield from _negative(results)


def _negative(results: EvaluationResults) -> Iterator[str]:
    """Which specs are not shown to beat a floor, and which lie below one."""
    yield "### Negative findings\n"
    empty = [line for line in wording.findings(results) if "no sub-task passes" in line]
    yield from (f"- {line}" for line in empty)
    kind, same = equal_cost.word(results), "with the same counts at the same layers"
    for control, name in (
        ("equal cost", f"{kind} of equal total cost"),
        ("random", f"random tokens {same}"),
        ("uniform", f"a uniform grid {same}"),
        ("equal tokens", f"{kind} to as many tokens"),
    ):
        floors = [one for one in results.comparisons if results.row(one.row).control == control]
        if not floors and control == "equal cost":
            continue
        below = [one for one in floors if one.difference.mean > 0 and one.p_holm < LEVEL]
        level = [one for one in floors if one.p_holm >= LEVEL]
        for title, some in (("Significantly **below**", below), ("Not shown to be above", level)):
            said = "; ".join(f"{one.baseline} {_flipped(one)}" for one in some) or "none"
            yield f"- {title} {name}: {said}."
    for one in results.comparisons:
        if not results.row(one.row).control and one.p_holm < LEVEL and one.difference.mean > 0:
            yield f"- {one.row} is **above** the default {one.baseline}: {one.difference.signed()}."
    yield from (f"- {note}" for note in results.notes)
    yield ""


def _gates(results: EvaluationResults) -> Iterator[str]:
    _, header, rows = wording.gate_table(results)
    yield "### Validity gate\n"
    yield (
        "A sub-task counts where the full model has 90% or more, 30 points more than without an image, and 10 more "
        "than random at about 11% and than with all visual tokens dropped where the first reduction stands.\n"
    )
    yield table_head(header)
    yield from (table_row(row) for row in rows)
    yield ""


def _budget(results: EvaluationResults, base: RowResult, methods: Sequence[RowResult]) -> Iterator[str]:
    assert base.average is not None
    yield f"### {base.average:.1f} of {results.model['visual_tokens']} visual tokens on average\n"
    if equal_cost.comparisons(results):
        yield f"{equal_cost.sentence(results, {row.name for row in methods})}\n"
    yield table_head(
        ["", "tokens", "accuracy", "retained", "- random", "- default", "default non-inferior", "GFLOPs", "1st token"]
    )
    compared = {(one.row, one.baseline): one for one in results.comparisons}
    for row in methods:
        random = results.control("random", row.schedule)
        floor = compared.get((random.name, row.name)) if random is not None else None
        yield _line(results, row, _flipped(floor), compared.get((row.name, base.name)))
    controls = [
        results.control(control, row.schedule)
        for row in methods
        for control in ("oracle", "random", "uniform", "equal tokens")
    ]
    names = [row.name for row in controls if row is not None] + [row.equal_cost for row in methods if row.equal_cost]
    for control in dict.fromkeys(names):
        yield _line(results, results.row(control), "", None)
    ends = [row for row in results.rows if row.control in ("size", "none", "full", "no image", "wrong image")]
    for row in ends:
        yield _line(results, row, "", None)
    yield ""


def _line(results: EvaluationResults, row: RowResult, floor: str, default: Comparison | None) -> str:
    if row.refused:
        return table_row([shown_name(row), "not applicable", *[""] * 7])
    kind = COUNTED if COUNTED in row.accuracy else OVERALL
    speed = results.speed.get(row.name)
    flops = row.flops if row.answer_flops is None else row.answer_flops
    power = "" if default is None else f"({100 * default.power:.0f}%, {default.scenes_for_90})"
    return table_row(
        [
            shown_name(row),
            f"{row.average:.1f}",
            str(row.accuracy[kind]),
            str(row.retained[kind] or ""),
            floor,
            "" if default is None else f"{default.difference.signed()}{_star(default)}",
            "" if default is None else f"{'yes' if default.p_baseline_inferior_holm < LEVEL else 'no'} {power}",
            "" if flops is None else f"{flops / 1e9:.3g}",
            "" if speed is None else f"{1000 * speed.first_token:.0f} ms",
        ]
    )


def _flipped(one: Comparison | None) -> str:
    """A floor minus a method as the method minus the floor."""
    if one is None:
        return ""
    return f"{flipped(one)}{_star(one)}"


def _star(one: Comparison) -> str:
    return " *" if one.p_holm < LEVEL else ""


def _by_kind(results: EvaluationResults) -> Iterator[str]:
    """Accuracies by sub-task at the smallest budget."""
    base, methods = list(budgets(results))[-1]
    floors = [row.name for row in results.rows if row.control and row.schedule in (base.schedule, "")]
    yield "### By sub-task, smallest budget\n"
    yield "Accuracy in percent, all sub-tasks; intervals and other budgets stand in the results file.\n"
    yield table_head(["", *results.kinds])
    for name in [*(row.name for row in methods), *floors]:
        row = results.row(name)
        if not row.refused:
            yield table_row([shown_name(row), *(f"{row.accuracy[kind].mean:.0f}" for kind in results.kinds)])
    yield ""


def main() -> None:
    """Writes docs/results.md, the pages and figures below docs/results/, the README's table and blocks of a page."""
    files, docs = measured(), ROOT / "docs"
    made = {path: text.encode() for path, text in pages(files).items()}
    tested = [EvaluationResults.load(file) for file in files if _kind(file) == "eval"]
    made |= figures.drawn(tested)
    (docs / "results").mkdir(exist_ok=True)
    for old in (docs / "results").iterdir():
        if f"results/{old.name}" not in made:
            old.unlink()
    for path, content in made.items():
        (docs / path).write_bytes(content)
    shown = next(one for one in tested if one.model["name"] == MODEL)
    write_block(ROOT / "README.md", block(shown))
    for text in choose.blocks(RESULTS).values():
        write_block(docs / "choose-a-spec.md", text)
    Console().print(
        f"wrote {', '.join(f'docs/{path}' for path in made)} and blocks of README.md and docs/choose-a-spec.md"
    )


if __name__ == "__main__":
    main()
