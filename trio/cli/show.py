"""`trio show`: what a spec will do on a model, and what that will cost, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json

if TYPE_CHECKING:
    from ..cost import CostPrediction, ModelShape

DEFAULT_SHAPE = "llava-1.5-7b"
DEFAULT_TOKENS = {"llava-1.5-7b": 576, "llava-next-7b": 2880, "qwen2.5-vl-7b": 1296}


def show(
    spec: Annotated[str, typer.Argument(help="Shipped spec or a YAML file; see `trio list specs`.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Published shape, zoo model, folder or hub name.")
    ] = DEFAULT_SHAPE,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Visual tokens of the image. Default: as the model has.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, max=10_000_000, help="Other tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=0, max=10_000_000, help="Tokens to generate.")] = 0,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the spec itself, in canonical form.")] = False,
    as_json: Json = False,
) -> None:
    """Show the tokens by layer and the predicted cost of a spec on a model."""
    from ..cost import predict
    from ..spec import load_spec
    from ..spec.schedule import resolve
    from .common import print_json

    loaded = load_spec(spec)
    if as_yaml:
        typer.echo(loaded.to_yaml(), nl=False)
        return
    shape, default = _shape(model)
    started = tokens or default
    schedule = resolve(loaded, shape.layers)
    schedule.check(loaded.resized(started))
    cost = predict(loaded, shape, images=(started,), text_tokens=text_tokens, new_tokens=new_tokens)
    if as_json:
        print_json(
            {
                "spec": loaded.name,
                "model": shape.name,
                "visual_tokens": started,
                "stages": [
                    {"after_layer": layer, "kept": kept}
                    for layer, kept in zip(schedule.layers, schedule.stage_counts(loaded.resized(started)), strict=True)
                ],
                "visual_by_layer": cost.compressed.visual_by_layer,
                "average_kept": cost.average_kept,
                "retention": cost.retention,
                "flops_reduction": cost.flops_reduction,
                "kv_reduction": cost.kv_reduction,
                "cost": cost.model_dump(mode="json"),
            }
        )
        return
    _print(loaded.description, loaded.source, shape, cost)


def _shape(model: str) -> tuple[ModelShape, int]:
    """The model's shape, and the visual tokens of one image of its usual size."""
    from ..cost import PUBLISHED, shape_of
    from .common import load_config

    if model in PUBLISHED:
        return PUBLISHED[model], DEFAULT_TOKENS.get(model, 576)
    shape = shape_of(load_config(model)).model_copy(update={"name": model})
    usual = shape.tower.crop_tokens if shape.tower is not None else None
    return shape, usual or 576


def _print(description: str, source: str, shape: ModelShape, cost: CostPrediction) -> None:
    from rich.table import Table
    from rich.text import Text

    from .tables import console, layer_ranges, print_table, quantity, times

    out = console()
    out.print(Text(f"{cost.spec} on {shape.name}", style="bold"))
    for line in (description, source and f"source: {source}"):
        if line:
            out.print(Text(line))
    out.print()
    counts = cost.compressed.visual_by_layer
    width = max(0, min(40, out.width - 36))  # beside layers, count and share
    chart = Table(box=None, padding=(0, 1), header_style="bold")
    chart.add_column("layers", justify="right", no_wrap=True)
    chart.add_column("visual tokens", justify="right", no_wrap=True)
    chart.add_column("", no_wrap=True)
    for layers, (count,) in layer_ranges(counts):
        filled = round(width * count / cost.visual_tokens) if cost.visual_tokens else 0
        bar = Text("█" * max(filled, 1 if count else 0), style="cyan")
        chart.add_row(layers, str(count), bar.append(f" {count / cost.visual_tokens:.1%}", style="dim"))
    out.print(chart)
    out.print(Text(f"average {cost.average_kept:.1f} of {cost.visual_tokens} visual tokens ({cost.retention:.1%})"))
    out.print()

    table = Table(title="predicted cost", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("")
    for name in ("full", "compressed", "ratio"):
        table.add_column(name, justify="right")

    def row(name: str, full: float, compressed: float, unit: str, base: int = 1000, **options: Any) -> None:
        ratio = full / compressed if compressed else None
        cells = (quantity(full, unit, base=base), quantity(compressed, unit, base=base))
        table.add_row(name, *cells, times(ratio) if full or compressed else "", **options)

    full, less = cost.full.flops, cost.compressed.flops
    for part in ("tower", "projector", "compression", "prefill", "scoring", "selection", "decode"):
        if getattr(full, part) or getattr(less, part):
            before, after = getattr(full, part), getattr(less, part)
            if before:
                row(part, before, after, "FLOP")
            else:
                table.add_row(part, "", quantity(after, "FLOP"), "")
    row("FLOPs in all", full.total, less.total, "FLOP", end_section=True)
    row("KV cache", cost.full.kv_bytes, cost.compressed.kv_bytes, "B", base=1024)
    print_table(out, table)
    note = f"prompt: {cost.visual_tokens} visual and {cost.text_tokens} other tokens; {cost.new_tokens} generated"
    for line in (note, *cost.notes):
        out.print(Text(line, style="dim"))
