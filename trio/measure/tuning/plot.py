"""The plot of a search: quality against FLOPs, what was tried, the front, and the verdict on unseen images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..fidelity.report import FidelityRow
from ..plots import matplotlib, save
from .report import TuningReport, cost_of, quality_of
from .target import COSTS, QUALITIES, parse_target

#: Colours that the colour-blind tell apart (Okabe and Ito), with a marker of their own each.
TUNED, DEFAULT, CHANCE, EQUAL = ("#0072B2", "o"), ("#D55E00", "s"), ("#555555", "X"), ("#009E73", "D")


def draw(report: TuningReport, file: Path) -> None:
    """Writes the plot (PNG, PDF or SVG, by the file's name).

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = matplotlib().Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    quality = report.quality
    tried = [(one.values["flops"], one.values[quality]) for one in report.candidates]
    axes.scatter(*_percent(tried), s=16, color="#BBBBBB", label=f"tried ({len(tried)}), images of the search")
    best = [report.candidate(trial).values for trial in report.front]
    axes.step(
        *_percent([(one["flops"], one[quality]) for one in best]),
        where="post",
        color=TUNED[0],
        linewidth=1.2,
        label="front, images of the search",
    )
    chosen = report.candidate(report.best).values
    axes.scatter(
        *_percent([(chosen["flops"], chosen[quality])]),
        s=90,
        facecolors="none",
        edgecolors=TUNED[0],
        linewidths=1.6,
        zorder=4,
        label="chosen, images of the search",
    )
    tuned, default = report.unseen.results
    rows: tuple[tuple[FidelityRow, str, tuple[str, str]], ...] = (
        (tuned.spec, "chosen", TUNED),
        (default.spec, default.spec.name, DEFAULT),
    )
    if tuned.equal_cost is not None:
        rows = (*rows, (tuned.equal_cost, "equal cost to the chosen", EQUAL))
    for row, label, style in (*rows, (tuned.floor, "random, as the chosen", CHANCE)):
        _judged(axes, row, quality, f"{label}, unseen images", *style)
    for bound in parse_target(report.target.split(" and ")).bounds:
        if bound.metric == quality:
            axes.axhline(100 * bound.value, color="black", linestyle=":", linewidth=1, label=f"target {bound}")
        elif bound.metric == "flops":
            axes.axvline(100 * bound.value, color="black", linestyle=":", linewidth=1, label=f"target {bound}")
    unknown = any("FLOPs are not known" in note for note in report.notes)
    axes.set_xlabel(f"{'visual tokens' if unknown else COSTS['flops'][2]}, %")
    axes.set_ylabel(f"{QUALITIES[quality].removesuffix(', in percent')}, %")
    axes.set_title(f"{report.model}: {report.trials} specs tried for {report.target}", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    save(figure, file)


def _judged(axes: Any, row: FidelityRow, quality: str, label: str, colour: str, marker: str) -> None:
    found = quality_of(row, quality)
    assert found is not None  # a report's quality is one
    value = 100 * found.mean
    axes.errorbar(
        [100 * cost_of(row, "flops")],
        [value],
        yerr=[[max(0.0, value - 100 * found.low)], [max(0.0, 100 * found.high - value)]],
        color=colour,
        marker=marker,
        markersize=8,
        capsize=4,
        linestyle="none",
        zorder=5,
        label=label,
    )


def _percent(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [100 * x for x, _ in points], [100 * y for _, y in points]
