"""What a prefill and a decoding step ask of an accelerator: operators, copies and waits, counted at true 7B shapes.

``python -m benchmarks.launches`` prints a table, ``--out FILE`` also writes the numbers. No accelerator: see
`trio.testing.launches`. Numbers of operators are exact but for attention, which counts as one kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import trio
from trio.spec.load import shipped_specs
from trio.testing.launches import Launches, answered, count
from trio.testing.shapes import ARCHITECTURES, meta_inputs, meta_model

console = Console()
#: The shipped specs that fit an architecture: by a word of their name, or for every model.
FITTING = {"llava-1.5-7b": "llava-1.5", "llava-next-7b": "llava-next", "qwen2.5-vl-7b": "qwen2.5-vl"}
FOR_ALL = tuple(f"{name}-{share}" for name in ("trio-soft", "engine-divprune") for share in (11, 22, 33, 50, 75))
BATCHES = (1, 8)


@dataclass(frozen=True)
class Measured:
    """A prefill with a spec, beside that of the stock model.

    Attributes:
        architecture: name of the shapes.
        spec: name of the spec.
        batch: samples, each with one image.
        stages: stages of the spec.
        stock: operators of the stock model.
        operators: with the spec.
        scoring: operators of scorers and probes.
        selecting: operators of selectors.
        encoder: operators of reading the tower, compressing, and writing back.
        bookkeeping: all others beyond the stock model's.
        uploads: copies from the host to the device, ours.
        waiting_uploads: those for which the host waits.
        waits: how often we make the host wait, those included.
        rounds: waits of selectors that choose on the host, one a round, among those.
        lines: where, the most waits and the most operators first.
    """

    architecture: str
    spec: str
    batch: int
    stages: int
    stock: int
    operators: int
    scoring: int
    selecting: int
    encoder: int
    bookkeeping: int
    uploads: int
    waiting_uploads: int
    waits: int
    rounds: int
    lines: tuple[str, ...]

    @property
    def over(self) -> int:
        return self.operators - self.stock

    @property
    def a_stage(self) -> float:
        """Scoring and bookkeeping, a stage."""
        return (self.scoring + self.bookkeeping) / max(self.stages, 1)


@cache
def model_of(architecture: str) -> Any:
    return meta_model(architecture)


@cache
def stock_of(architecture: str, batch: int) -> Launches:
    model = model_of(architecture)
    with torch.no_grad():
        return count(partial(model, logits_to_keep=1), meta_inputs(architecture, model, batch))


def prefill(architecture: str, spec: str, batch: int) -> Measured:
    """Counts a prefill."""
    model, stock = model_of(architecture), stock_of(architecture, batch)
    pipeline = answered(lambda: trio.Pipeline.from_spec(spec, model))
    with torch.no_grad(), pipeline:
        found = count(partial(model, logits_to_keep=1), meta_inputs(architecture, model, batch))
    parts = {part: found.of(part).operators for part in ("scoring", "selecting", "encoder")}
    over = found.operators - stock.operators
    return Measured(
        architecture=architecture,
        spec=spec,
        batch=batch,
        stages=len(pipeline.spec.stages),
        stock=stock.operators,
        operators=found.operators,
        **parts,
        bookkeeping=over - sum(parts.values()),
        uploads=found.ours.uploads,
        waiting_uploads=found.ours.waiting_uploads,
        waits=found.ours.waits,
        rounds=found.of("selecting").waits,
        lines=(*found.lines(waits_only=True)[:12], *found.lines()[:12]),
    )


@dataclass(frozen=True)
class Step:
    """A decoding step in `generate`: its operators, our waits, and the lines of a prefill and two steps."""

    operators: int
    waits: int
    lines: tuple[str, ...]


def decode_step(architecture: str, spec: str | None, batch: int) -> Step:
    """Counts the second step; without a spec of the stock model."""
    model = model_of(architecture)
    inputs = meta_inputs(architecture, model, batch)

    def tokens(number: int) -> Launches:
        return count(partial(model.generate, do_sample=False, max_new_tokens=number, min_new_tokens=number), inputs)

    with torch.no_grad(), ExitStack() as attached:
        if spec is not None:
            attached.enter_context(answered(lambda: trio.Pipeline.from_spec(spec, model)))
        shorter, longer = tokens(2), tokens(3)
    return Step(
        longer.operators - shorter.operators,
        longer.ours.waits - shorter.ours.waits,
        (*longer.lines(waits_only=True)[:12], *longer.lines()[:12]),
    )


def specs_of(architecture: str) -> list[str]:
    """The shipped specs that fit."""
    return sorted(name for name in shipped_specs() if FITTING[architecture] in name) + list(FOR_ALL)


def everything() -> Iterator[Measured]:
    for architecture in ARCHITECTURES:
        for batch in BATCHES:
            for spec in specs_of(architecture):
                yield prefill(architecture, spec, batch)


def main(out: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None) -> None:
    """Counts prefills of all shipped specs that fit, and one decoding step for each architecture."""
    parts = ("scoring", "selecting", "encoder", "bookkeeping")
    columns = ("batch", "operators", "of stock", *parts, "uploads", "waits", "of selectors")
    table = Table("shapes", "spec", *columns, title="A prefill; waits and uploads are ours")
    rows = []
    for row in everything():
        rows.append(row)
        numbers = (row.scoring, row.selecting, row.encoder, row.bookkeeping, row.uploads, row.waits, row.rounds)
        times = f"{row.operators / row.stock:.2f}"
        table.add_row(row.architecture, row.spec, *map(str, (row.batch, row.operators, times, *numbers)))
    console.print(table)
    steps = Table("shapes", "spec", "operators over stock", "waits", title="A decoding step in generate")
    decoding = []
    for architecture in ARCHITECTURES:
        stock = decode_step(architecture, None, 2).operators
        for spec in (specs_of(architecture)[0], FOR_ALL[0]):
            step = decode_step(architecture, spec, 2)
            steps.add_row(architecture, spec, str(step.operators - stock), str(step.waits))
            decoding.append({"architecture": architecture, "spec": spec, "batch": 2, "stock": stock})
            decoding[-1] |= {"operators": step.operators, "waits": step.waits}
    console.print(steps)
    if out is not None:
        made = {
            "command": f"python -m benchmarks.launches --out {out}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prefill": [asdict(row) for row in rows],
            "decode": decoding,
        }
        out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
