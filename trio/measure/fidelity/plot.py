"""The plot of fidelity by position: KL and top-1 at each token of the full model's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ..plots import matplotlib, save
from .report import FidelityReport, FidelityRow

#: Images that must have an answer as long as that for a position to be drawn.
FEWEST = 3


def draw(report: FidelityReport, file: Path) -> None:
    """Writes the plot (PNG, PDF or SVG, by the file's name): each spec as a line, its random tokens dashed.

    Raises:
        InputError: matplotlib is missing, answers were not compared by position, or the file cannot be written.
    """
    if report.results[0].spec.positions is None:
        raise InputError("plot: answers were not compared at every position, see the report's notes; leave it out.")
    figure = matplotlib().Figure(figsize=(8, 6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, result in enumerate(report.results):
        for row, style in ((result.spec, "-"), (result.floor, "--")):
            _line(upper, row, "kl", f"C{number}", style, 1.0)
            _line(lower, row, "top1", f"C{number}", style, 100.0)
    upper.set(ylabel="KL(full ‖ compressed), nats")
    upper.set_title(f"{report.model}: the full model's answer, fed to both", loc="left")
    upper.legend(fontsize=8)
    lower.set(ylabel="same most probable token, %", xlabel="token of the answer")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    save(figure, file)


def _line(axes: Any, row: FidelityRow, metric: str, colour: str, style: str, scale: float) -> None:
    """The means by position, with their intervals as a band behind a spec's own line."""
    assert row.positions is not None  # all rows are compared, or none
    places = [place for place in row.positions.by_position if place.images >= FEWEST]
    found = [(place.first, getattr(place, metric).scaled(scale, 6)) for place in places]
    at = [position for position, _ in found]
    axes.plot(at, [one.mean for _, one in found], color=colour, linestyle=style, marker=".", label=row.name)
    if style == "-":
        axes.fill_between(at, [one.low for _, one in found], [one.high for _, one in found], color=colour, alpha=0.15)
