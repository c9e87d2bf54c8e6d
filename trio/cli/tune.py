"""`trio tune`: search for the spec that meets a target on the user's own images."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

    from ..measure.tuning import TuningReport


class SamplerName(StrEnum):
    """Ways of searching."""

    tpe = "tpe"
    nsga2 = "nsga2"


def tune(
    model: ModelArgument,
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            "-t",
            help="What to reach: agreement>=99%, answers>=95%, similarity>=98%, flops<=33%, tokens<=11%, speed>=3x; "
            "may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="File that the best spec is written to, as YAML.")],
    images: Annotated[Path | None, IMAGES] = None,
    prompts: Prompts = None,
    task: TaskName = None,
    trials: Annotated[int, typer.Option(min=1, help="Specs to try, those of an earlier run included.")] = 60,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto front to this file (needs matplotlib).")] = None,
    study: Annotated[
        Path | None, typer.Option(help="Keep the trials in this file; a stopped search goes on from it.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the images that the search does not see.")] = 0.5,
    limit: Annotated[int | None, typer.Option(min=2, help="At most this many images. Default: all; tasks: 40.")] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="A scorer, selector or compressor not to use; repeatable.")
    ] = None,
    sampler: Annotated[SamplerName, typer.Option(help="tpe: Parzen estimators; nsga2: evolution.")] = SamplerName.tpe,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 4,
    seed: Annotated[int, typer.Option(help="Of the split, the search and the random tokens.")] = 0,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Search for the spec that meets a target, and judge it on images that the search has not seen."""
    from ..measure.fidelity import read_samples
    from ..measure.tuning import best_spec, parse_target
    from ..measure.tuning import tune as search
    from ..measure.tuning.plot import draw
    from ..measure.tuning.study import optuna
    from .common import check_outputs, check_plot, load_model, print_json, progress_bar, say, writable, write_text
    from .samples import bundled_samples, check_source
    from .tables import console

    bounds = parse_target(target)  # everything that can be wrong without the model, before it
    optuna()
    check_outputs({"--out": out, "--plot": plot}, force=force)
    if study is not None:
        writable(study, "--study", force=True)  # a search goes on from its own
    if plot is not None:
        check_plot(plot)
    check_source(images, prompts, task)
    samples = None if images is None else read_samples(images, prompts, limit=limit)
    network, processor = load_model(model, dtype=dtype.value, device=device)
    samples = samples or bundled_samples(network, limit)
    with progress_bar("searching") as bar:
        report = search(
            network,
            processor,
            samples,
            target=bounds,
            trials=trials,
            held_out=held_out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            sampler=sampler.value,
            without=without or (),
            study=study,
            name=model,
            progress=lambda what, done, total: bar(done, total),
        )
    write_text(out, best_spec(report).to_yaml(), "--out")
    if plot is not None:
        draw(report, plot)
    if as_json:
        print_json(json.loads(report.to_json()))
        return
    print_report(report, console())
    written = [str(file) for file in (out, plot) if file is not None]
    say(f"written: {', '.join(written)}")


def print_report(report: TuningReport, out: Console) -> None:
    """The verdict, the spec and the tables."""
    from rich.table import Table
    from rich.text import Text

    from .tables import print_notes, print_table

    out.print(Text(f"{report.model}: {report.trials} specs tried for {report.target}", style="bold"))
    for line in report.verdict():
        out.print(Text(line))
    spec = report.spec
    if "resize" in spec:
        out.print(Text(f"  images resized to {spec['resize']} of their tokens"))
    if "compressor" in spec:
        out.print(Text(f"  compressor {_part(spec['compressor'])}"))
    for stage in spec.get("stages", []):
        keep = stage["keep"]
        share = f"{keep['share']} of what reaches it" if isinstance(keep, dict) else keep
        parts = f"{_part(stage['scorer'])}, {_part(stage['selector'])}"
        out.print(Text(f"  after layer {stage['after_layer']}: keeps {share} by {parts}"))
    for agreement, what in ((report.search, "images of the search"), (report.unseen, "unseen images")):
        title = f"{agreement.images} {what}, {agreement.samples} prompts"
        table = Table(title=title, title_justify="left", title_style="", header_style="bold")
        for column in ("", "first token same", "answer same", "tokens", "FLOPs", "to first token"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for result, name in zip(agreement.results, ("tuned", agreement.results[1].spec.name), strict=True):
            for row, called in zip(result.rows(), (name, "  random", "  equal cost"), strict=False):
                table.add_row(
                    Text(called),
                    row.agreement.top1.percent(),
                    row.agreement.exact.percent(),
                    f"{row.retention:.1%}",
                    "?" if row.flops is None else f"{row.flops:.1%}",
                    f"{row.speedup.first_token:.2f}x",
                    end_section=row is result.rows()[-1],
                )
        print_table(out, table)
    out.print(Text("in brackets: 95% intervals; random: as many tokens at the same places, drawn at random"))
    if any(result.equal_cost is not None for result in report.unseen.results):
        out.print(Text("equal cost: a smaller image that costs no more, or pooled tokens where images have one size"))
    refused = sum(report.refused.values())
    notes = [f"{refused} of {report.trials} specs could not run: {'; '.join(report.refused)}"] if refused else []
    notes += [f"{part} was left out: {reason}" for part, reason in report.left_out.items()]
    print_notes(out, list(dict.fromkeys([*notes, *report.notes, *report.unseen.all_notes()])))


def _part(part: str | dict[str, object]) -> str:
    """A part for people: `nms (threshold 0.8)`."""
    if isinstance(part, str):
        return part
    params = ", ".join(f"{key} {value}" for key, value in part.items() if key != "name")
    return f"{part['name']} ({params})" if params else str(part["name"])
