"""`trio fidelity`: how far the compressed model answers as the full one does, without labels."""

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
    SpecNames,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.fidelity import FidelityReport


def fidelity(
    model: ModelArgument,
    images: Annotated[Path, IMAGES],
    spec: SpecNames = None,
    prompts: Prompts = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(*OUT, help="File that the whole report is written to, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw agreement by position to this file (needs matplotlib).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Measure, without labels, how far each spec leaves a model's answers as they are, and what it saves."""
    from ..measure.fidelity import measure, read_samples
    from ..measure.fidelity.plot import draw
    from ..spec import load_spec
    from .common import check_outputs, check_plot, load_model, print_json, progress_bar, say, write_text
    from .tables import console

    # before the model: a wrong name should not cost a minute
    specs = [load_spec(one) for one in spec or [DEFAULT_SPEC]]
    samples = read_samples(images, prompts, limit=limit)
    check_outputs({"--out": out, "--plot": plot}, force=force)
    if plot is not None:
        check_plot(plot)
    network, processor = load_model(model, dtype=dtype.value, device=device)
    with progress_bar("batches") as progress:
        report = measure(
            network,
            processor,
            specs,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            name=model,
            progress=progress,
        )
    if out is not None:
        write_text(out, report.to_json(indent=1) + "\n", "--out")
    if plot is not None:
        draw(report, plot)
    if as_json:
        print_json(json.loads(report.to_json()))
        return
    print_report(report, console())
    if out is not None:
        say(f"everything written to {out}")
    if plot is not None:
        say(f"plot written to {plot}")


def print_report(report: FidelityReport, out: Console) -> None:
    """The report as tables."""
    from rich.table import Table
    from rich.text import Text

    from .tables import duration, print_notes, print_table, times

    prompts = f"{report.samples} prompts on {report.images} images, batches of {report.batch_size}"
    out.print(Text(f"{report.model}: {prompts}, {report.dtype} on {report.device}", style="bold"))
    agreement = Table(header_style="bold")
    for column in ("", "first token same", "KL, nats", "answer same", "edit similarity"):
        agreement.add_column(column, justify="right" if column else "left")
    savings = Table(header_style="bold")
    for column in ("", "visual tokens", "FLOPs", "to first token", "", "to end", ""):
        savings.add_column(column, justify="right" if savings.columns else "left")
    places = Table(header_style="bold")
    for column in ("every token", "same", "KL, nats", "worst place", "same there", "KL there"):
        places.add_column(column, justify="right" if places.columns else "left")
    full = report.results[0].spec.visual_tokens
    first, end = duration(report.full.first_token), duration(report.full.answer)
    savings.add_row("full", f"{full:.1f}", "100%", first, "", end, "", end_section=True)
    for result in report.results:
        names = (result.spec.name, "  random", "  equal cost")
        for name, row in zip(names, result.rows(), strict=False):
            found = row.agreement
            shown = (found.top1.percent(), found.kl.plain(), found.exact.percent(), found.edit.plain())
            agreement.add_row(Text(name), *map(_two_lines, shown))
            if row.positions is not None:
                overall, worst = row.positions.overall, row.positions.worst
                places.add_row(
                    Text(name),
                    *map(_two_lines, (overall.top1.percent(), overall.kl.plain())),
                    worst.name,
                    *map(_two_lines, (worst.top1.percent(), worst.kl.plain())),
                    end_section=row is result.rows()[-1],
                )
            savings.add_row(
                Text(name),
                f"{row.average_kept:.1f}",
                "?" if row.flops is None else f"{row.flops:.1%}",
                duration(row.seconds.first_token),
                times(row.speedup.first_token),
                duration(row.seconds.answer),
                times(row.speedup.answer),
                end_section=row is result.rows()[-1],
            )
        for name, gained in (("  above random", result.gain), ("  above equal cost", result.equal_gain)):
            if gained is not None:
                shown = (gained.top1.points(), gained.kl.change(), gained.exact.points(), gained.edit.change())
                last = result.equal_gain is None or gained is result.equal_gain
                agreement.add_row(name, *map(_two_lines, shown), end_section=last)
    print_table(out, agreement)
    if places.rows:
        print_table(out, places)
    print_table(out, savings)
    out.print(Text("below each mean: its 95% interval, samples of one image drawn together"))
    if places.rows:
        out.print(Text("every token: the full model's answer is fed to both, its end token included"))
    out.print(Text("random: as many tokens at the same places, drawn at random"))
    if any(result.equal_cost is not None for result in report.results):
        out.print(Text("equal cost: a smaller image that costs no more, or pooled tokens where images have one size"))
    print_notes(out, report.all_notes())


def _two_lines(estimate: str) -> str:
    """The interval below its mean."""
    return estimate.replace(" (", "\n").removesuffix(")")
