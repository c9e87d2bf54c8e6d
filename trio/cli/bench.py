"""`trio bench`: how fast a model is, full beside compressed, on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DEFAULT_SPEC
from .common import OUT, BatchSize, Device, DType, DTypeName, Force, Json, SpecNames

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.bench import BenchReport, Prompts


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Zoo model, folder or hub name; or --arch.", metavar="[MODEL]")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="Random weights in the shape of llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b or qwen3-vl-8b.",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="With --arch: decoder layers; the tower is cut in proportion.")
    ] = None,
    spec: SpecNames = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="With MODEL: image file.")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="With MODEL: what to ask.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="With --arch: HEIGHTxWIDTH of the image in pixels, such as 672x672.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=8, max=100_000, help="With --arch: tokens beside the image.")] = 64,
    batch_size: BatchSize = 1,
    steps: Annotated[int, typer.Option("--steps", min=0, max=4096, help="Decode steps behind each prefill.")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000, help="Rounds at most.")] = 9,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="After these no further round starts.")] = 300.0,
    quick: Annotated[bool, typer.Option("--quick", help="Only the full model, the specs and their oracles.")] = False,
    out: Annotated[Path | None, typer.Option(*OUT, help="File that the whole report is written to, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Image file: time against tokens. Needs the extra `eval`.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Time a model on this machine: full, with each spec, and with an oracle that is given the tokens to keep."""
    from ..cost import shape_of
    from ..errors import InputError, TrioError
    from ..measure.bench import BenchSettings, measure
    from ..spec import load_spec
    from .common import check_outputs, check_plot, print_json, progress_bar, say, write_text
    from .tables import console

    if (model is None) == (arch is None):
        raise InputError("MODEL and --arch: give one of them: a checkpoint, or the shape of a published model.")
    specs = [load_spec(one) for one in spec or [DEFAULT_SPEC]]
    check_outputs({"--out": out, "--plot": plot}, force=force)
    if plot is not None:
        check_plot(plot)
    if arch is not None:
        if image is not None or question is not None:
            raise InputError("--image and --question: they go with MODEL; --arch has images of noise.")
        network, prompts = _built(arch, layers, size, text_tokens, dtype, device)
    else:
        if layers is not None or size is not None:
            raise InputError("--layers and --size: they go with --arch; a checkpoint runs as it is.")
        network, prompts = _loaded(str(model), image, question, dtype, device)
    settings = BenchSettings(
        batch=batch_size,
        steps=steps,
        rounds=rounds,
        seconds=seconds,
        controls=not quick,
        details=not quick,
        search=not quick,
    )
    with progress_bar("rounds") as progress:
        report = measure(
            network,
            prompts,
            specs,
            settings=settings,
            name=str(arch or model),
            weights="random; decoder layers share them" if arch else "of the checkpoint",
            command=shlex.join(["trio", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else "",
            progress=progress,
        )
    if plot is not None:
        from ..measure.bench.plot import plot as draw

        try:
            shape = shape_of(network.config, dtype_bytes=network.dtype.itemsize)
        except TrioError:
            shape = None
        draw(report, shape, plot)
    if out is not None:
        write_text(out, report.to_json(indent=1) + "\n", "--out")
    if as_json:
        print_json(json.loads(report.to_json()))
        return
    print_report(report, console())
    for file in (out, plot):
        if file is not None:
            say(f"written to {file}")


def _built(
    arch: str, layers: int | None, size: str | None, text_tokens: int, dtype: DType, device: str
) -> tuple[Any, Prompts]:
    """A model of true shape, and prompts for it."""
    import torch

    from ..errors import InputError
    from ..measure.bench import NoisePrompts, architecture, build, config_of
    from .common import first_line

    found = architecture(arch)
    largest = None if size is None else _size(size)
    config = config_of(found, layers=layers)
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    wanted = dtype.value if dtype is not DType.auto else "float32" if device == "cpu" else "bfloat16"
    prompts = NoisePrompts(found, config, text_tokens=text_tokens, largest=largest)
    prompts.visual(prompts.sizes[0])  # refused before the weights are made
    try:
        return build(config, dtype=getattr(torch, wanted), device=device), prompts
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--arch {arch!r} on {device!r}: {first_line(error)}; give fewer --layers.") from error


def _size(text: str) -> tuple[int, int]:
    from ..errors import InputError

    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InputError(f"--size {text!r}: give height and width in pixels, such as 672x672.")
    return int(height), int(width)


def _loaded(model: str, image: Path | None, question: str | None, dtype: DType, device: str) -> tuple[Any, Prompts]:
    """The user's checkpoint, and prompts through its processor."""
    from .. import zoo
    from ..measure.bench import ImagePrompts
    from .common import load_image, load_model

    loaded = load_image(image or zoo.demo_image())
    network, processor = load_model(model, dtype=dtype.value, device=device)
    return network, ImagePrompts(processor, loaded, question or zoo.demo_question())


def print_report(report: BenchReport, out: Console) -> None:
    """The report as tables."""
    from rich.table import Table
    from rich.text import Text

    from .tables import duration, print_notes, print_table, quantity, times

    machine = report.machine
    title = f"{report.model}, {report.layers} layers, {report.dtype}, batch of {report.batch}, "
    out.print(Text(f"{title}{report.visual_tokens} visual and {report.text_tokens} text tokens", style="bold"))
    load = "" if machine.load is None else f", load {machine.load:.1f}"
    speed = f"{quantity(machine.flops_per_second, 'FLOP')}/s, {quantity(machine.bytes_per_second, 'B')}/s"
    out.print(Text(f"{machine.device}, {machine.threads} threads{load}; reaches {speed}"))
    table = Table(header_style="bold")
    headings = ("", "tokens", "FLOPs", "to first token", "faster", "interval", "a step", "memory", "launches")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in report.rows:
        ratio = row.speedup
        table.add_row(
            row.name,
            f"{row.average_kept:.0f}" if row.kind != "short" else "",
            "" if row.flops is None else quantity(row.flops, "FLOP"),
            "" if row.prefill is None else duration(row.prefill.median),
            "" if ratio is None else times(ratio.value),
            "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}",
            "" if row.decode is None else duration(row.decode.median),
            "" if row.peak_bytes is None else quantity(row.peak_bytes, "B", base=1024),
            "" if row.launches is None else f"{row.launches:,}",
        )
    print_table(out, table)
    _print_phases(report, out)
    for verdict in report.verdicts:
        out.print(Text(str(verdict)))
    for target in report.targets:
        sign, value = ("at least" if target.at_least else "at most"), ("held" if target.held else "missed")
        of = "" if target.spec is None else f"{target.spec}: "
        out.print(Text(f"{of}{target.name} {target.found:.1%}, {sign} {target.bound:.1%}: {value}"))
    print_notes(out, [f"{row.name}: {note}" for row in report.rows for note in row.notes])


def _print_phases(report: BenchReport, out: Console) -> None:
    from rich.table import Table

    from .tables import duration, print_table

    rows = [row for row in report.rows if row.phases]
    names = list(dict.fromkeys(name for row in rows for name in row.phases or {}))
    if not rows:
        return
    table = Table(header_style="bold", title="where the time of a prefill goes")
    for heading in ("", *names):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        phases = row.phases or {}
        table.add_row(row.name, *(duration(phases[name]) if name in phases else "" for name in names))
    print_table(out, table)
