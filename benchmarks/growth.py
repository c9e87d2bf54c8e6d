"""How cost grows with the number of visual tokens and with the batch: scoring, selectors, compressors.

``python -m benchmarks.growth`` measures, and writes ``benchmarks/results/growth.json``, which ``python -m
benchmarks.performance`` puts into docs/performance.md. Launches, work and the largest tensor are counted, and the
same on every machine; seconds are of this one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.counting import Counted, count
from trio.adapters import adapter_for
from trio.core.context import LayerContext, SelectionContext, TokenOrigins
from trio.core.probe import LayerInputs
from trio.core.token_batch import TokenBatch
from trio.core.tokens import ImageTokens, Signal, VisualTokens
from trio.encoders.compressors.base import COMPRESSORS
from trio.measure.bench import describe
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS
from trio.testing import tiny_llava

RESULT = Path(__file__).parent / "results" / "growth.json"
#: Visual tokens: a square of tiny-llava, LLaVA-1.5, LLaVA-NeXT, and documents and videos.
TOKENS = (144, 576, 2880, 8000, 20_000)
BATCHES = (1, 4, 16)
#: Tokens kept where N varies; N where the count varies; the batch's N.
KEEP, COUNTS, MIDDLE = 64, (16, 64, 256), 576
WIDTH, HEADS, TEXT = 64, 4, 32
#: Bytes of one tensor above which a larger case is not run.
ROOM = 1 << 30
#: Seconds that one case may take, judged by the smaller ones.
PATIENCE = 10.0
REPEATS = 3
console = Console()

#: Makes the call that is measured: tokens, tokens kept, batch.
Case = Callable[[int, int, int], Callable[[], Any]]


def selector_case(name: str) -> Case:
    """A selector on random features with positions."""

    def make(tokens: int, keep: int, batch: int) -> Callable[[], Any]:
        generator = torch.Generator().manual_seed(0)
        saliency = torch.rand(batch, tokens, generator=generator)
        features = torch.randn(batch, tokens, WIDTH, generator=generator)
        row, column = torch.rand(2, batch, tokens, generator=generator)
        zeros = torch.zeros(batch, tokens, dtype=torch.int64)
        context = SelectionContext.start(
            saliency,
            features,
            torch.full((batch,), keep),
            origins=TokenOrigins(row=row, column=column, image=zeros, frame=zeros, kind=zeros),
        )
        part = SELECTORS.build(name)
        return lambda: part.select(context)

    return make


def compressor_case(name: str) -> Case:
    """A compressor on all inputs of a batch, with the signals that it reads."""

    def make(tokens: int, keep: int, batch: int) -> Callable[[], Any]:
        part = COMPRESSORS.build(name)
        columns = max(c for c in range(1, math.isqrt(tokens) + 1) if tokens % c == 0)
        origins = ImageTokens.from_grid(tokens // columns, columns)
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for _ in range(batch):
            features = torch.randn(tokens, WIDTH, generator=generator)
            signals = {signal: _signal(signal, tokens, generator) for signal in part.reads()}
            class_token = torch.randn(WIDTH, generator=generator) if part.wants_cls else None
            inputs.append(VisualTokens.start(features, origins, signals, class_token=class_token))
        stacked = TokenBatch.stack(inputs)
        return lambda: part.compress_batch(stacked, [keep] * batch)

    return make


def _signal(signal: Signal, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Random values of a signal."""
    if signal.kind == "attention":
        return torch.rand(tokens, generator=generator) / tokens
    if signal.kind == "keys":
        return torch.randn(tokens, HEADS, WIDTH // HEADS, generator=generator)
    if signal.kind == "groups":
        return torch.arange(tokens) // 2 * 2
    return torch.randn(*(() if signal.kind == "cls" else (tokens,)), WIDTH, generator=generator)


def scorer_case(name: str) -> Case:
    """A scorer between the layers of a tiny random model; the text stands behind the image."""
    adapter = adapter_for(tiny_llava(layers=2))
    width = adapter.text_config.hidden_size

    def make(tokens: int, keep: int, batch: int) -> Callable[[], Any]:
        columns = tokens + TEXT
        hidden = torch.randn(batch, columns, width, generator=torch.Generator().manual_seed(0))
        visual = (torch.arange(columns) < tokens).expand(batch, -1)
        valid = torch.ones_like(visual)
        index = torch.arange(tokens).expand(batch, -1)
        image = ImageTokens.from_grid(tokens, 1)
        with torch.no_grad():
            rotary = adapter.rotary(hidden, torch.arange(columns)[None])
        inputs = LayerInputs(hidden=hidden, valid=valid, rotary=rotary)
        context = LayerContext(
            hidden=hidden,
            visual=visual,
            valid=valid,
            visual_index=index,
            visual_valid=torch.ones_like(index, dtype=torch.bool),
            token_index=index,
            images=((image,),) * batch,
            counts=((tokens,),) * batch,
            seeds=(0,) * batch,
            after_layer=1,
            num_layers=2,
            probes={which: lambda: adapter.probe(1, inputs) for which in ("next", "last", "ran")},
        )
        part = SCORERS.build(name)

        def score() -> torch.Tensor:
            with torch.no_grad():
                return part.score(context)

        return score

    return make


def cases() -> dict[tuple[str, str], Case]:
    """All parts of this package, by kind and name."""
    found = {("scorer", name): scorer_case(name) for name in SCORERS.names()}
    found |= {("selector", name): selector_case(name) for name in SELECTORS.names()}
    return found | {("compressor", name): compressor_case(name) for name in COMPRESSORS.names()}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The p of the best fit of values by a constant times size to the p; 0.0 for one size."""
    if len(sizes) < 2:
        return 0.0
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-12)) for value in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def seconds(call: Callable[[], Any]) -> float:
    """The median of a few calls."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def series(case: Case, points: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """A series of cases that grow: tokens, tokens kept, batch; ends early where the next would not fit."""
    rows: list[dict[str, Any]] = []
    for point in points:
        if rows:
            last = rows[-1]
            step = math.prod(point) / math.prod(last["point"])
            if last["largest"] * step**2 > ROOM and _grows(rows, "largest") > 1.5:
                break
            if last["seconds"] * step ** max(1.0, _grows(rows, "seconds")) > PATIENCE:
                break
        call = case(*point)
        counted: Counted = count(call)
        rows.append({"point": point, **vars(counted), "seconds": seconds(call)})
    return {
        "rows": rows,
        **{f"{name} exponent": round(_grows(rows, name), 2) for name in (*vars(Counted()), "seconds")},
    }


def _grows(rows: Sequence[dict[str, Any]], name: str) -> float:
    return exponent([math.prod(row["point"]) for row in rows], [row[name] for row in rows])


def main(
    out: Annotated[Path, typer.Option(help="Result.")] = RESULT,
    most: Annotated[int, typer.Option(help="Visual tokens at most.")] = TOKENS[-1],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure and write the result."""
    torch.set_num_threads(threads)
    machine = describe(torch.device("cpu"), torch.float32)
    parts: list[dict[str, Any]] = []
    for (kind, name), case in cases().items():
        by_tokens = series(case, [(tokens, KEEP, 1) for tokens in TOKENS if tokens <= most])
        by_batch = series(case, [(MIDDLE, KEEP, batch) for batch in BATCHES])
        by_count = series(case, [(MIDDLE, keep, 1) for keep in COUNTS])
        parts.append({"kind": kind, "name": name, "tokens": by_tokens, "batch": by_batch, "count": by_count})
        console.print(kind, name, {key: value for key, value in by_tokens.items() if key != "rows"})
    found = {
        "command": "python -m benchmarks.growth",
        "machine": f"{machine.device}, {threads} thread(s), torch {torch.__version__}, load "
        + ("not known" if machine.load is None else f"{machine.load:.1f} when it began"),
        "shapes": {"width": WIDTH, "keep": KEEP, "tokens of the batch": MIDDLE, "text": TEXT, "dtype": "float32"},
        "parts": parts,
    }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
