"""`trio fidelity`: how far the compressed model answers as the full one does, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import DEFAULT_SPEC
from .common import DType

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.fidelity import FidelityReport


def fidelity(
    model: Annotated[str, typer.Argument(help="Zoo model, folder or hub name.")],
    images: Annotated[Path, typer.Option("--images", "-i", help="Folder with pictures.")],
    spec: Annotated[
        list[str] | None,
        typer.Option("--spec", "-s", help=f"Shipped spec or a YAML file; may be repeated. Default: {DEFAULT_SPEC}."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            "-p",
            help='Text file, one prompt a line, each for every picture; or JSONL, {"image": ..., "prompt": ...}. '
            "Default: a prompt that asks for a description.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer, in tokens.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many pictures. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    dtype: Annotated[DType, typer.Option(help="Number format of the weights.")] = DType.auto,
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Measure, without labels, how far each spec leaves a model's answers as they are, and what it saves."""
    from ..measure.fidelity import measure, read_samples
    from ..spec import load_spec
    from .common import check_outputs, console, load_model, progress_bar, say, write_text

    # before the model: a wrong name should not cost a minute
    specs = [load_spec(one) for one in spec or [DEFAULT_SPEC]]
    samples = read_samples(images, prompts, limit=limit)
    check_outputs({"--json": json_file}, force=force)
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
    if json_file is not None:
        write_text(json_file, report.to_json(indent=1) + "\n", "--json")
    print_report(report, console())
    if json_file is not None:
        say(f"everything written to {json_file}")


def print_report(report: FidelityReport, out: Console) -> None:
    """The report as tables."""
    from rich.table import Table
    from rich.text import Text

    from .common import duration, print_notes, times

    prompts = f"{report.samples} prompts on {report.pictures} pictures, batches of {report.batch_size}"
    out.print(Text(f"{report.model}: {prompts}, {report.dtype} on {report.device}", style="bold"))
    agreement = Table(header_style="bold")
    for column in ("", "first token same", "KL, nats", "answer same", "edit similarity"):
        agreement.add_column(column, justify="right" if column else "left")
    savings = Table(header_style="bold")
    for column in ("", "visual tokens", "FLOPs", "to first token", "", "to end", ""):
        savings.add_column(column, justify="right" if savings.columns else "left")
    full = report.results[0].spec.visual_tokens
    first, end = duration(report.full.first_token), duration(report.full.answer)
    savings.add_row("full", f"{full:.1f}", "100%", first, "", end, "", end_section=True)
    for result in report.results:
        for name, row in ((result.spec.name, result.spec), ("  random", result.floor)):
            found = row.agreement
            shown = (found.top1.percent(), found.kl.plain(), found.exact.percent(), found.edit.plain())
            agreement.add_row(Text(name), *map(_two_lines, shown))
            savings.add_row(
                Text(name),
                f"{row.average_kept:.1f}",
                "?" if row.flops is None else f"{row.flops:.1%}",
                duration(row.seconds.first_token),
                times(row.speedup.first_token),
                duration(row.seconds.answer),
                times(row.speedup.answer),
                end_section=row is result.floor,
            )
        gained = result.gain
        shown = (gained.top1.points(), gained.kl.change(), gained.exact.points(), gained.edit.change())
        agreement.add_row("  above random", *map(_two_lines, shown), end_section=True)
    out.print(agreement)
    out.print(savings)
    out.print(Text("below each mean: its 95% interval, samples of one picture drawn together"))
    out.print(Text("random: as many tokens at the same places, drawn at random"))
    print_notes(out, report.all_notes())


def _two_lines(estimate: str) -> str:
    """The interval below its mean."""
    return estimate.replace(" (", "\n").removesuffix(")")
