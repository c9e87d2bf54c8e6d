"""The two figures of docs/results.md, from the committed results.

What is plotted is made first, as plain numbers, and its digest is written into the image: so a test can hold a
committed image against the results without drawing it again, whatever version of matplotlib drew it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.readme import defaults
from benchmarks.tables import LEVEL, method
from trio.measure.evaluation.results import COUNTED, OVERALL, EvaluationResults, RowResult

#: Methods and controls of the first figure, with colour and line style; "" is the default.
CURVES = {
    "": ("#00695c", "-"),
    "TRIO (paper)": ("#1f77b4", "-"),
    "divprune": ("#9467bd", "-"),
    "visionzip": ("#e377c2", "-"),
    "random": ("#7f7f7f", ":"),
    "lower resolution": ("#bcbd22", ":"),
}
LEVELS = ("full", "no image")
Panel = dict[str, Any]


def accuracy(results: EvaluationResults) -> Panel:
    """Curves of a model: share kept, accuracy and its interval, in percent."""
    bases = defaults(results)
    by_name = {one.name: one for one in results.rows}
    curves = {}
    for name in CURVES:
        if name in ("random", "lower resolution"):
            control = "equal tokens" if name == "lower resolution" else name
            rows = [results.control(control, base.schedule) for base in bases.values()]
        else:
            rows = [by_name.get(f"{name}, {share}") if name else base for share, base in bases.items()]
        points = [_point(results, row) for row in rows if row is not None and not row.refused]
        if points:
            curves[name or method(next(iter(bases.values())).name)] = points
    levels = {name: _mean(results.row(name)) for name in LEVELS}
    return {"model": results.model["name"], "curves": curves, "levels": levels}


def _point(results: EvaluationResults, row: RowResult) -> list[float]:
    assert row.average is not None
    found = row.accuracy.get(COUNTED, row.accuracy[OVERALL])
    kept = 100 * row.average / results.model["visual_tokens"]
    return [round(value, 3) for value in (kept, found.mean, found.low, found.high)]


def _mean(row: RowResult) -> float:
    return round(row.accuracy.get(COUNTED, row.accuracy[OVERALL]).mean, 3)


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
    "results/accuracy.png": accuracy,
    "results/differences.png": differences,
}


def drawn(found: Sequence[EvaluationResults]) -> dict[str, bytes]:
    """The images as PNG, by their paths below ``docs``."""
    draw = {accuracy: _draw_accuracy, differences: _draw_differences}
    return {path: draw[panel]([panel(one) for one in found]) for path, panel in FIGURES.items()}


def _draw_accuracy(panels: Sequence[Panel]) -> bytes:
    figure, axes = _grid(len(panels), height=3.4)
    styles = {name: style for panel in panels for name, style in zip(panel["curves"], CURVES.values(), strict=False)}
    styles |= {name: style for name, style in CURVES.items() if name}
    for ax, panel in zip(axes, panels, strict=False):
        for name, points in panel["curves"].items():
            colour, line = styles[name]
            x, mean, low, high = zip(*points, strict=True)
            errors = [[m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)]]
            ax.errorbar(x, mean, yerr=errors, label=name, color=colour, linestyle=line, marker="o", ms=4, capsize=2)
        for name, value in panel["levels"].items():
            ax.axhline(value, color="0.5", linewidth=0.8)
            ax.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        ax.set_title(panel["model"], fontsize=10)
        ax.set(xlabel="visual tokens kept, average over the layers, %", ylabel="answered right, %", ylim=(15, 106))
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return _png(figure, digest(panels))


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
