"""`trio bench` with one more way: TRIO as its released code builds it (`benchmarks.naive`).

``python -m benchmarks.speed llava-1.5-7b --batch-size 1`` writes ``benchmarks/results/bench-llava-1.5-7b-1.json``,
which ``python -m benchmarks.performance`` puts into docs/performance.md. Whole models by default: all layers and
the whole tower; on two cores a round of one spec takes minutes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.naive import naive
from trio.cli.bench import print_report
from trio.measure.bench import BenchReport, BenchSettings, NoisePrompts, architecture, build, config_of, measure
from trio.spec import load_spec

RESULTS = Path(__file__).parent / "results"
SPECS = ("trio-soft-11", "trio-soft-22", "trio-soft-33")
console = Console(width=140)


def speed(
    arch: str,
    specs: Sequence[str] = SPECS,
    *,
    layers: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    size: tuple[int, int] | None = None,
    settings: BenchSettings | None = None,
    command: str = "",
) -> BenchReport:
    """Builds a model of an architecture and measures specs on it, the naive way among the others."""
    shape = architecture(arch)
    config = config_of(shape, layers=layers)
    model = build(config, dtype=getattr(torch, dtype), device=device)
    loaded = [load_spec(spec) for spec in specs]
    return measure(
        model,
        NoisePrompts(shape, config, largest=size),
        loaded,
        settings=settings,
        name=arch,
        weights="random; decoder layers share them",
        more=lambda maker: naive(maker, loaded[:1]),
        command=command,
    )


def main(
    arch: Annotated[str, typer.Argument(help="Architecture, as `trio bench --arch`.")],
    spec: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples.")] = 1,
    rounds: Annotated[int, typer.Option(help="At most.")] = 6,
    seconds: Annotated[float, typer.Option(help="After these no further round starts.")] = 3600.0,
    dtype: Annotated[str, typer.Option(help="Number format.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Measure and write the result."""
    torch.set_num_threads(threads)
    settings = BenchSettings(batch=batch_size, rounds=rounds, seconds=seconds)
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    report = speed(arch, spec or SPECS, layers=layers, dtype=dtype, device=device, settings=settings, command=command)
    print_report(report, console)
    cut = "" if layers is None else f"-{layers}of{architecture(arch).arguments()['text_config']['num_hidden_layers']}"
    name = f"bench-{arch}{cut}-{batch_size}{'' if device == 'cpu' else '-' + device.partition(':')[0]}.json"
    (RESULTS / name).write_text(report.to_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
