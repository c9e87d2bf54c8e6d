"""Time against tokens: what was measured, beside the oracle and the least time that the machine allows."""

from __future__ import annotations

from pathlib import Path

from ...cost import ModelShape, predict
from ..plots import matplotlib, save
from .report import BenchReport

__all__ = ["plot", "roofline"]

_SHARES = (1.0, 0.75, 0.5, 0.33, 0.25, 0.18, 0.12, 0.08, 0.05)
_MARKS = {"full": "s", "spec": "o", "oracle": "^", "resize": "D", "pool": "v", "naive": "X", "keep-all": "P"}


def roofline(report: BenchReport, shape: ModelShape) -> list[tuple[float, float]]:
    """The least seconds of a prefill on the machine of the report, by visual tokens that run in every layer.

    FLOPs at the speed of a large matrix product, or reading the decoder's weights once at the speed of copying,
    whichever is slower. An estimate: nothing reaches it.

    Returns:
        (visual tokens of a sample, seconds), most tokens first.
    """
    machine, found = report.machine, []
    weights = shape.layers * (
        2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim + 3 * shape.hidden * shape.intermediate
    )
    reading = weights * shape.dtype_bytes / machine.bytes_per_second
    for share in _SHARES:
        count = max(1, round(report.visual_tokens * share))
        spec = {"version": 1, "name": "line", "stages": [{"after_layer": 0, "keep": count, "scorer": "random"}]}
        cost = predict(spec, shape, images=(report.visual_tokens,), text_tokens=report.text_tokens).compressed.flops
        work = (cost.total - cost.scoring - cost.selection) * report.batch
        found.append((float(count), max(work / machine.flops_per_second, reading)))
    return found


def plot(report: BenchReport, shape: ModelShape | None, file: Path, option: str = "--plot") -> None:
    """Draws the plot into a file; without a shape it has no roofline.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    figure = matplotlib().Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if shape is not None:
        line = roofline(report, shape)
        axes.plot(*zip(*line, strict=True), color="0.6", linestyle="--", label="roofline (estimate)")
    for kind, mark in _MARKS.items():
        rows = [row for row in report.rows if row.kind == kind and row.prefill is not None]
        if not rows:
            continue
        times = [row.prefill for row in rows if row.prefill is not None]
        middle = [time.median for time in times]
        errors = [[time.median - time.low for time in times], [time.high - time.median for time in times]]
        tokens = [row.average_kept for row in rows]
        axes.errorbar(tokens, middle, yerr=errors, fmt=mark, capsize=2, label=kind)
    axes.set(
        xlabel="visual tokens, mean over the layers",
        ylabel="seconds to the first token",
        title=f"{report.model}, {report.layers} layers, {report.dtype}, batch {report.batch}",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, file, option)
