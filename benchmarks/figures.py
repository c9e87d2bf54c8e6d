"""The figures of docs/results.md, from the committed results.

What is plotted is made first, as plain numbers, and its digest is written into the image: so a test can hold a
committed image against the results without drawing it again, whatever version of matplotlib drew it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.equal_cost import cost_share, word
from benchmarks.readme import defaults
from benchmarks.tables import LEVEL, method, smaller
from trio.measure.evaluation.results import COUNTED, OVERALL, EvaluationResults, RowResult

#: Colour and line style of the methods; "" is the default.
METHODS = {
    "": ("#00695c", "-"),
    "TRIO (released)": ("#ff7f0e", "-"),
    "TRIO (paper)": ("#1f77b4", "-"),
    "divprune": ("#9467bd", "-"),
    "visionzip": ("#e377c2", "-"),
    "resize 60% + trio-soft": ("#2ca02c", "-"),
}
#: Of the controls; those but ``random`` stand in the legend as ``resize, equal tokens`` or ``average-pool, ...``.
CONTROLS = {"random": ("#7f7f7f", ":"), "equal tokens": ("#bcbd22", ":"), "equal cost": ("#8c564b", "--")}
#: The full model on smaller images, the line that methods are to be above.
BASE = ("0.15", "--")
LEVELS = ("full", "no image")
Panel = dict[str, Any]


def cost(results: EvaluationResults) -> Panel:
    """Curves of a model: total cost of an answer in percent of the full model's, accuracy and its interval.

    Without curves where the total cost was not counted; without that of smaller images where they were not asked.
    """
    curves: dict[str, list[list[float]]] = {}
    rows = [row for row in results.rows if row.control in ("full", "size") and not row.refused]
    if len(rows) > 1:
        curves[_base(results)] = _by_cost(results, rows)
    default = method(next(iter(defaults(results).values())).name)
    for name in METHODS:
        rows = [row for row in results.methods if method(row.name) == (name or default) and not row.refused]
        curves[name or default] = _by_cost(results, rows)
    shown = {name: points for name, points in curves.items() if points}
    return {"model": results.model["name"], "curves": shown, "levels": _levels(results)}


def _base(results: EvaluationResults) -> str:
    return f"{word(results)}, nothing else"


def _by_cost(results: EvaluationResults, rows: Sequence[RowResult]) -> list[list[float]]:
    found = [(share, row) for row in rows if (share := cost_share(results, row)) is not None]
    return [_point(share, row) for share, row in sorted(found, key=lambda pair: pair[0])]


def accuracy(results: EvaluationResults) -> Panel:
    """Curves of a model: share kept, accuracy and its interval, in percent; controls stand at the default's share."""
    bases = defaults(results)
    default = method(next(iter(bases.values())).name)
    by_name = {one.name: one for one in results.rows}
    curves = {}
    for name in METHODS:
        found = {share: by_name.get(f"{name or default}, {share}") for share in bases}
        curves[name or default] = [_kept(results, row) for row in found.values()]
    for name in CONTROLS:
        controls = [
            by_name.get(base.equal_cost) if name == "equal cost" else results.control(name, base.schedule)
            for base in bases.values()
        ]
        kind = next((smaller(row) for row in controls if row is not None), "")
        title = name if name == "random" else f"{kind}, {name}"
        curves[title] = [_kept(results, row, at=base) for row, base in zip(controls, bases.values(), strict=True)]
    measured = {name: [point for point in points if point is not None] for name, points in curves.items()}
    shown = {name: points for name, points in measured.items() if points}
    return {"model": results.model["name"], "curves": shown, "levels": _levels(results)}


def _kept(results: EvaluationResults, row: RowResult | None, *, at: RowResult | None = None) -> list[float] | None:
    """The point of a row, at its own share or at another row's."""
    placed = at or row
    if row is None or row.refused or placed is None or placed.average is None:
        return None
    return _point(100 * placed.average / results.model["visual_tokens"], row)


def _point(place: float, row: RowResult) -> list[float]:
    found = row.accuracy.get(COUNTED, row.accuracy[OVERALL])
    return [round(value, 3) for value in (place, found.mean, found.low, found.high)]


def _levels(results: EvaluationResults) -> dict[str, float]:
    rows = {name: results.row(name) for name in LEVELS}
    return {name: round(row.accuracy.get(COUNTED, row.accuracy[OVERALL]).mean, 3) for name, row in rows.items()}


def differences(results: EvaluationResults) -> Panel:
    """Every method minus the default of the smallest budget, in points: mean, interval, whether it is significant."""
    share, base = list(defaults(results).items())[-1]
    rows = [
        [method(one.row), *(round(v, 3) for v in (gap.mean, gap.low, gap.high)), one.p_holm < LEVEL]
        for one in results.comparisons
        for gap in [one.difference]
        if one.baseline == base.name and not results.row(one.row).control
    ]
    return {"model": results.model["name"], "share": share, "rows": rows}


def digest(panels: Sequence[Panel]) -> str:
    """What an image says it was made from."""
    return hashlib.sha256(json.dumps(panels, sort_keys=True).encode()).hexdigest()


#: What is plotted, a panel a model, by the images' paths below ``docs``.
FIGURES: dict[str, Callable[[EvaluationResults], Panel]] = {
    "results/cost.png": cost,
    "results/accuracy.png": accuracy,
    "results/differences.png": differences,
}


def plotted(found: Sequence[EvaluationResults]) -> dict[str, list[Panel]]:
    """The panels of every figure by its path; a figure for which nothing was measured is left out."""
    panels = {path: [make(one) for one in found] for path, make in FIGURES.items()}
    return {path: some for path, some in panels.items() if any(one.get("curves", True) for one in some)}


def drawn(found: Sequence[EvaluationResults]) -> dict[str, bytes]:
    """The images as PNG, by their paths below ``docs``."""
    draw = {"results/cost.png": _draw_cost, "results/accuracy.png": _draw_accuracy}
    return {path: draw.get(path, _draw_differences)(panels) for path, panels in plotted(found).items()}


def _draw_cost(panels: Sequence[Panel]) -> bytes:
    return _draw_curves(panels, "total cost of an answer, % of the full model's")


def _draw_accuracy(panels: Sequence[Panel]) -> bytes:
    return _draw_curves(panels, "visual tokens kept, average over the layers, %")


def _draw_curves(panels: Sequence[Panel], label: str) -> bytes:
    figure, axes = _grid(len(panels), height=3.4)
    legend: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=False):
        for name, points in panel["curves"].items():
            colour, line = _style(name)
            x, mean, low, high = zip(*points, strict=True)
            errors = [[m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)]]
            marks = {"color": colour, "linestyle": line, "marker": "o", "ms": 4, "capsize": 2}
            legend.setdefault(name, ax.errorbar(x, mean, yerr=errors, label=name, **marks))
        for name, value in panel["levels"].items():
            ax.axhline(value, color="0.5", linewidth=0.8)
            ax.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        if not panel["curves"]:
            ax.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
        ax.set_title(panel["model"], fontsize=10)
        ax.set(xlabel=label, ylabel="answered right, %", ylim=(15, 106))
        ax.grid(alpha=0.25)
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=3, fontsize=9)
    return _png(figure, digest(panels))


def _style(name: str) -> tuple[str, str]:
    """Of a method by its name, of a control by what stands behind the comma; the default is none of them."""
    if name in METHODS:
        return METHODS[name]
    if name.endswith(", nothing else"):
        return BASE
    return CONTROLS.get(name.rpartition(", ")[2], METHODS[""])


def _draw_differences(panels: Sequence[Panel]) -> bytes:
    figure, axes = _grid(len(panels), height=4.6)
    for ax, panel in zip(axes, panels, strict=False):
        rows = sorted(panel["rows"], key=lambda row: row[1])
        for place, (_, mean, low, high, significant) in enumerate(rows):
            colour = "#00695c" if mean > 0 else "#b35900"
            ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=colour, capsize=2, elinewidth=1)
            ax.plot(mean, place, "o", ms=5, color=colour, markerfacecolor=colour if significant else "white")
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        ax.set_title(f"{panel['model']}, {panel['share']} kept", fontsize=10)
        ax.set(xlabel="method minus the default, points")
        ax.grid(alpha=0.25, axis="x")
    return _png(figure, digest(panels))


def _grid(panels: int, *, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(2, panels)
    rows = -(-panels // columns)
    figure: Any = Figure(figsize=(4.9 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes


def _png(figure: Any, made_from: str) -> bytes:
    """The image with the digest as its description."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Description": made_from})
    return out.getvalue()
