"""Results in words and tables, the same in the terminal, in the report and in the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from ..statistics import Estimate
from .results import COUNTED, OVERALL, Comparison, EvaluationResults, RowResult

__all__ = ["comparison_table", "findings", "gate_table", "main_table", "ordered", "short_table", "tables"]

Table = tuple[str, list[str], list[list[str]]]
LEVEL = 0.05
#: Controls that stand in every table, in this order, behind the specs of their schedule.
CONTROLS = ("random", "uniform", "equal tokens", "equal cost", "oracle")


def tables(results: EvaluationResults) -> list[Table]:
    """Title, header and rows of every table."""
    return [main_table(results), gate_table(results), comparison_table(results)]


def ordered(results: EvaluationResults) -> list[RowResult]:
    """Full, then each schedule's specs and controls, then what no choice of tokens can change."""
    ends = ("size", "none", "wrong image", "no image")
    rows = [results.row("full")]
    for schedule in dict.fromkeys(row.schedule for row in results.rows if row.schedule):
        mine = [row for row in results.rows if row.schedule == schedule]
        rows += [row for row in mine if not row.control]
        rows += [row for control in CONTROLS for row in mine if row.control == control]
    return rows + [row for control in ends for row in results.rows if row.control == control]


def main_table(results: EvaluationResults) -> Table:
    """One row a spec or control, with everything."""
    graded = any(row.anls for row in results.rows)
    kinds_of_right = ["accuracy", *(["ANLS"] if graded else []), "counted", "retained"]
    header = ["row", "tokens", "average", _counted(results), *kinds_of_right, "first token", "answer"]
    rows = []
    for row in ordered(results):
        if row.refused:
            rows.append([row.name, *["not applicable"] * (len(header) - 1)])
            continue
        similar = [str(row.anls[OVERALL])] if graded else []
        texts = (str(row.accuracy[OVERALL]), *similar, _cell(row.accuracy.get(COUNTED)), _cell(_retained(row)))
        rows.append([row.name, _number(row.tokens), *_costs(row), *texts, *_times(results, row)])
    return _title(results), header, rows


def short_table(results: EvaluationResults) -> Table:
    """The same for a terminal: controls stand below the schedule that they belong to."""
    header = ["", "tokens", "GFLOPs", "accuracy", "retained", "1st token", "answer"]
    rows, schedule = [], ""
    for row in ordered(results):
        if row.schedule and row.schedule != schedule:
            rows.append([row.schedule, *[""] * (len(header) - 1)])
        schedule = row.schedule
        name = f"  {_own(row)}" if row.schedule else row.name
        if row.refused:
            rows.append([name, *["n/a"] * (len(header) - 1)])
            continue
        kept = _retained(row)
        texts = (_short(row.accuracy[OVERALL]), "none counts" if kept is None else _short(kept))
        rows.append([name, *_costs(row), *texts, *_times(results, row)])
    return _title(results), header, rows


def _own(row: RowResult) -> str:
    """What a row is called below its schedule: `resize, equal cost`."""
    if row.control not in ("equal tokens", "equal cost"):
        return row.control or row.name
    kind = "resize" if row.name.startswith("resize") else "average-pool"
    return f"{kind}, {row.control}"


def _title(results: EvaluationResults) -> str:
    return f"{results.model['name']}: {_asked(results)}"


def _counted(results: EvaluationResults) -> str:
    """What the FLOPs in a table are of: whole answers, or (results of earlier versions) prefills."""
    whole = any(row.answer_flops is not None for row in results.rows)
    return "GFLOPs, answer" if whole else "GFLOPs"


def _costs(row: RowResult) -> tuple[str, str]:
    """Average tokens and FLOPs."""
    flops = row.flops if row.answer_flops is None else row.answer_flops
    return _number(row.average), "?" if flops is None else f"{flops / 1e9:.3g}"


def _retained(row: RowResult) -> Estimate | None:
    """On the sub-tasks that count, where any does."""
    return row.retained.get(COUNTED, row.retained[OVERALL])


def _times(results: EvaluationResults, row: RowResult) -> tuple[str, str]:
    """Time to the first token, and how many times faster a whole answer is than the full model's."""
    speed, full = results.speed.get(row.name), results.speed.get("full")
    if speed is None or full is None:
        return "", ""
    return f"{1000 * speed.first_token:.0f} ms", f"{full.answer / speed.answer:.2f}x"


def _short(value: Estimate) -> str:
    return f"{value.mean:.1f} ({value.low:.0f}-{value.high:.0f})"


def gate_table(results: EvaluationResults) -> Table:
    """Which sub-tasks count, and why others do not."""
    header = [
        "sub-task, layers before the first stage",
        "full",
        "full - blank",
        "full - random",
        "full - none",
        "counts",
    ]
    rows = [
        [
            f"{gate.kind}, layer {gate.first}",
            f"{gate.full:.1f}",
            f"{gate.sees:+.1f}",
            f"{gate.random_loses:+.1f}",
            f"{gate.late_loses:+.1f}",
            "yes" if gate.passes else "no",
        ]
        for gate in results.gates
    ]
    return "Validity gate (90, 30, 10, 10): sub-tasks that measure the choice of tokens", header, rows


def comparison_table(results: EvaluationResults) -> Table:
    """Every row against its baseline."""
    header = ["row - baseline, points", "difference", "p (Holm)", "baseline worse by the margin, p (Holm)", "power"]
    rows = [
        [
            f"{one.row} - {one.baseline}" + ("" if one.gated else " (no sub-task passes the gate: all are taken)"),
            one.difference.signed(),
            _p(one.p_holm) + (f", too few scenes: {one.scenes} of {one.scenes_needed}" if _too_few(one) else ""),
            _p(one.p_baseline_inferior_holm),
            f"{100 * one.power:.0f}%, 90% from {one.scenes_for_90} scenes",
        ]
        for one in results.comparisons
    ]
    margin = results.settings["margin"]
    return f"Paired differences, clustered by scene; margin {margin:g} points", header, rows


def findings(results: EvaluationResults) -> Iterator[str]:
    """What the numbers say, negative findings too, made from the numbers alone."""
    counted = {
        gate.first: [g.kind for g in results.gates if g.first == gate.first and g.passes] for gate in results.gates
    }
    for first, kinds in counted.items():
        if not kinds:
            yield f"With a first stage after layer {first} no sub-task passes the gate: nothing there measures choice."
    for one in results.comparisons:
        yield _verdict(one) if not results.row(one.row).control else _against_floor(one)
    for row in results.methods:
        ceiling, kind = results.control("oracle", row.schedule), COUNTED if COUNTED in row.accuracy else OVERALL
        if ceiling is not None and kind in ceiling.accuracy:
            gap = row.accuracy[kind].mean - ceiling.accuracy[kind].mean
            yield f"{row.name} is {gap:+z.1f} points from the oracle ({row.schedule})."


def _against_floor(one: Comparison) -> str:
    """A spec against a floor; the comparison's row is the floor, its baseline the spec."""
    gain = -one.difference.mean
    said = f"{gain:+z.1f} ({-one.difference.high:+z.1f} to {-one.difference.low:+z.1f}) points, p = {_p(one.p_holm)}"
    if _too_few(one):
        return f"{one.baseline} against {one.row}: too few scenes to tell: {said}; {_bound(one)}."
    if one.p_holm < LEVEL:
        return f"{one.baseline} is {'above' if gain > 0 else 'BELOW'} {one.row}: {said}."
    return f"{one.baseline} is {'not shown to be' if gain > 0 else 'NOT'} above {one.row}: {said}."


def _too_few(one: Comparison) -> bool:
    """Whether no answers to these scenes could have shown a difference."""
    return one.p_smallest >= LEVEL


def _bound(one: Comparison) -> str:
    scenes = f"{one.scenes} {'scene' if one.scenes == 1 else 'scenes'}"
    return f"on {scenes} no p can be below {_p(one.p_smallest)}, a difference can be shown from {one.scenes_needed} on"


def _verdict(one: Comparison) -> str:
    if _too_few(one):
        text = (
            f"{one.row} and {one.baseline}: too few scenes to tell them apart ({one.difference.signed()} points, p = "
            f"{_p(one.p_holm)}; {_bound(one)})"
        )
    elif one.p_holm < LEVEL:
        side = "above" if one.difference.mean > 0 else "below"
        text = f"{one.row} is {side} {one.baseline} by {one.difference.signed()} points (p = {_p(one.p_holm)})"
    else:
        text = (
            f"{one.row} and {one.baseline} are not told apart ({one.difference.signed()} points, p = {_p(one.p_holm)})"
        )
    proved = one.p_baseline_inferior_holm < LEVEL
    margin = f"{one.margin:g} {'point' if one.margin == 1 else 'points'}"
    return f"{text}; {one.baseline} is {'' if proved else 'not shown to be '}non-inferior by {margin}."


def _asked(results: EvaluationResults) -> str:
    task = results.task
    split = f" {task['split']}" if "split" in task else ""
    return f"{task['name']}{split}, {task['questions']} questions on {task['scenes']} images; percent, 95% intervals"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}".removesuffix(".0")


def _cell(value: Estimate | None) -> str:
    return "none counts" if value is None else str(value)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
