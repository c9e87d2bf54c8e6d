"""Curves as SVG, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from ... import DISTRIBUTION
from ...errors import InputError
from .results import COUNTED, OVERALL, EvaluationResults, RowResult

__all__ = ["check_matplotlib", "cost_curve", "retention_curve", "speed_curve"]

#: Controls that are the full model on smaller images, or on pooled tokens.
BASELINE = ("full", "size", "equal cost")
Place = Callable[[RowResult], float | None]


def check_matplotlib() -> None:
    """Refuses early where the report cannot be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "report.html: its curves need matplotlib, which is not installed; "
            f"pip install '{DISTRIBUTION}[plot]', or give --no-html for results.json and results.csv alone."
        ) from error


def retention_curve(results: EvaluationResults) -> str:
    """Accuracy against the average share of visual tokens, as an SVG element."""

    def place(row: RowResult) -> float | None:
        return None if row.average is None else 100 * row.average / results.model["visual_tokens"]

    return _curve(results, place, "visual tokens, average over the layers, %")


def cost_curve(results: EvaluationResults) -> str:
    """Accuracy against the FLOPs of a whole answer, as an SVG element; empty where they were not counted.

    Smaller images (or pooled tokens) and the full model make one curve, the baseline.
    """

    def place(row: RowResult) -> float | None:
        return None if row.answer_flops is None else row.answer_flops / 1e9

    counted = any(row.answer_flops is not None for row in results.rows)
    return _curve(results, place, "total FLOPs of an answer, G", BASELINE) if counted else ""


def speed_curve(results: EvaluationResults) -> str:
    """Accuracy against the time to the first token, as an SVG element; empty where no time was measured."""

    def place(row: RowResult) -> float | None:
        speed = results.speed.get(row.name)
        return None if speed is None else 1000 * speed.first_token

    return _curve(results, place, "time to the first token of a batch, ms") if results.speed else ""


def _curve(results: EvaluationResults, place: Place, label: str, joined: Sequence[str] = ()) -> str:
    """A figure; rows of the controls in `joined` make one curve."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 6.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.add_subplot()
    for number, (method, rows) in enumerate(_lines(results, joined).items()):
        is_spec = not rows[0].control
        title: str | None = rows[0].name if len(rows) == 1 else method
        for segment in [rows] if method == _BASE else _segments(rows):
            legend = None if title is None else title.replace("$", r"\$")  # a name is no formula
            _segment(axes, segment, place, f"C{number % 10}", legend, is_spec)
            title = None  # a legend names a method once
    for name in ("full", "no image"):
        row = results.row(name)
        mean = row.accuracy.get(COUNTED, row.accuracy[OVERALL]).mean
        axes.axhline(mean, color="0.6", linewidth=0.8)
        axes.annotate(name, (0.01, mean), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    axes.set(xlabel=label, ylabel="questions answered right, %")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _segments(rows: Sequence[RowResult]) -> list[list[RowResult]]:
    """Rows that one line joins: of a control those whose stages stand after the same layers."""
    segments: dict[str, list[RowResult]] = {}
    for row in rows:
        segments.setdefault(row.schedule.partition(":")[0] if row.control else "", []).append(row)
    return list(segments.values())


def _segment(axes: Any, rows: Sequence[RowResult], place: Place, colour: str, label: str | None, is_spec: bool) -> None:
    kind = COUNTED if all(COUNTED in row.accuracy for row in rows) else OVERALL
    found = [(x, row.accuracy[kind]) for row in rows if (x := place(row)) is not None]
    if not found:
        return
    points = sorted(found, key=lambda point: point[0])
    errors = [[max(0.0, v.mean - v.low) for _, v in points], [max(0.0, v.high - v.mean) for _, v in points]]
    axes.errorbar(
        [x for x, _ in points],
        [value.mean for _, value in points],
        yerr=errors,
        label=label,
        color=colour,
        marker="o" if is_spec else "x",
        markersize=5,
        linewidth=1.6 if is_spec else 1.0,
        linestyle="-" if is_spec else ":",
        capsize=2,
        elinewidth=0.8,
    )


_BASE = "full model, smaller images or pooled tokens"


def _lines(results: EvaluationResults, joined: Sequence[str]) -> dict[str, list[RowResult]]:
    """Rows that make one curve: specs that differ in their counts alone, and each control."""
    lines: dict[str, list[RowResult]] = {}
    for row in results.rows:
        if not row.refused and row.control in joined:
            lines.setdefault(_BASE, []).append(row)
            continue
        if row.refused or row.control in ("full", "no image", "wrong image"):
            continue
        lines.setdefault(row.control or method_of(row), []).append(row)
    return lines


def method_of(row: RowResult) -> str:
    """What a spec does, without its numbers: compressor, scorers and selectors."""
    spec = row.spec or {}
    parts = [_name(spec["compressor"])] if spec.get("compressor") else []
    for stage in spec.get("stages", []):
        parts.append(f"{_name(stage.get('scorer', 'objective-gradient'))} + {_name(stage.get('selector', 'nms'))}")
    layers = ", ".join(str(stage["after_layer"]) for stage in spec.get("stages", []))
    return ", ".join(dict.fromkeys(parts)) + (f" after {layers}" if layers else "")


def _name(part: Any) -> str:
    if isinstance(part, str):
        return part
    more = {key: value for key, value in part.items() if key not in ("name", "keep", "if_fewer")}
    return str(part["name"]) + (f" ({', '.join(f'{k} {v}' for k, v in more.items())})" if more else "")
