"""`trio calibrate`: place stages by when the user's own model takes images in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import DEFAULT_SPEC
from .common import (
    IMAGES,
    OUT,
    BatchSize,
    Device,
    DType,
    DTypeName,
    Force,
    Json,
    MaxNewTokens,
    ModelArgument,
    Prompts,
)
from .samples import TaskName

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..measure.calibration import CalibrationReport, CalibrationRow, DropAllCurve


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(*OUT, help="File that the spec is written to, as YAML.")],
    images: Annotated[Path | None, IMAGES] = None,
    prompts: Prompts = None,
    task: TaskName = None,
    budget: Annotated[
        str, typer.Option("--budget", help="Share of the visual tokens, averaged over the layers.")
    ] = "11.1%",
    base: Annotated[
        str, typer.Option("--base", help="Spec whose scorers, selectors and positions are used.")
    ] = DEFAULT_SPEC,
    held_out: Annotated[float, typer.Option(help="Share of the images that only the verdict sees.")] = 0.5,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many images. Default: all; tasks: 40.")] = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 4,
    seed: Annotated[int, typer.Option(help="Of the split and the random tokens.")] = 0,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Write the chosen schedule also where the shipped one is better.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Place stages by when the model takes images in, and judge that on images that the choice has not seen."""
    from ..measure.calibration import QUESTIONS
    from ..measure.calibration import calibrate as place
    from ..measure.calibration.calibrate import budget_share, checked_base
    from ..measure.fidelity import read_samples
    from ..spec import load_spec
    from .common import check_outputs, load_model, print_json, progress_bar, say, write_text
    from .samples import bundled_samples, check_source
    from .tables import console

    budget_share(budget)  # everything that can be wrong without the model, before it
    parts = checked_base(load_spec(base))
    check_outputs({"--out": out}, force=force)
    check_source(images, prompts, task)
    samples = None if images is None else read_samples(images, prompts or QUESTIONS, limit=limit)
    network, processor = load_model(model, dtype=dtype.value, device=device)
    samples = samples or bundled_samples(network, limit)
    with progress_bar("calibrating") as bar:
        report = place(
            network,
            processor,
            samples,
            budget=budget,
            base=parts,
            held_out=held_out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            even_if_worse=even_if_worse,
            name=model,
            progress=lambda what, done, total: bar(done, total),
        )
    write_text(out, report.file(), "--out")
    if as_json:
        print_json(json.loads(report.to_json()))
        return
    print_report(report, console())
    say(f"written: {out}")


def print_report(report: CalibrationReport, out: Console) -> None:
    """The verdict, the curve and the schedules."""
    from rich.text import Text

    from .tables import print_notes, print_table

    curve = report.curve
    out.print(Text(f"{report.model}: {report.budget} of the visual tokens, parts of {report.base}", style="bold"))
    for line in report.verdict():
        out.print(Text(line))
    print_curve(curve, out)
    asked = f"{len(report.calibration_images)} images of the calibration, {curve.samples} prompts"
    print_table(out, _schedules(asked, report.rows, report.chosen))
    print_table(out, _schedules(f"{len(report.unseen_images)} unseen images", report.unseen, report.chosen))
    out.print(
        Text("in brackets: 95% intervals, prompts of one image drawn together; KL in nats, top-1 the same token,")
    )
    out.print(Text("both at every position of the full model's own answer; random: as many tokens, drawn at random"))
    print_notes(out, report.notes)


def print_curve(curve: DropAllCurve, out: Console) -> None:
    """The drop-all curve as a table."""
    from rich.table import Table

    from .tables import print_table

    title = f"all visual tokens dropped after so many layers ({curve.images} images, {curve.samples} prompts)"
    table = Table(title=title, title_justify="left", title_style="", header_style="bold")
    for column in ("after layer", "KL", "same token", "taken in up to here"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in curve.points:
        table.add_row(str(point.depth), point.kl.plain(), point.top1.percent(), f"{point.absorbed:.0%}")
    print_table(out, table)


def _schedules(title: str, rows: list[CalibrationRow], chosen: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="", header_style="bold")
    for column in ("schedule", "layer: tokens left", "KL", "same token", "FLOPs"):
        table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            Text("  random" if row.name == f"{chosen}, random" else row.name, "bold" if row.name == chosen else ""),
            row.schedule(),
            row.kl.plain(),
            f"{row.top1.mean:.1%}",
            "?" if row.flops is None else f"{row.flops:.1%}",
        )
    return table
