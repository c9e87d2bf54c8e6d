"""What a large job needs: a small job measured by its parts, and ten million images counted by formula.

``python -m benchmarks.scale`` measures on this machine and writes ``benchmarks/results/scale.json``; ``--table`` puts
what follows from it into docs/scale.md.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import trio
from benchmarks.tables import table_head, table_row, write_block
from trio import zoo
from trio.batch import LocalEngine, RowAnswerer, RowOutput, Shards, open_rows, run_job
from trio.core.images import batch_for, decode_image
from trio.cost import predict, published_shape
from trio.measure.answering import generate
from trio.measure.bench import describe
from trio.measure.shapesvqa.examples import examples

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale: python -m benchmarks.scale --table -->", "<!-- end of scale -->"
ROWS, BATCH, REPEATS, TOKENS = 128, 16, 3, 8
SPEC = "trio-soft-11"

#: Assumptions of the page: data sheet of an H100 (SXM), and the share of it that is reached. No GPU was measured.
PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12
REACHED_FLOPS, REACHED_BANDWIDTH = 0.4, 0.6
IMAGES, GPUS, DECODE_BATCH, TEXT_TOKENS, NEW_TOKENS = 10_000_000, 64, 32, 60, 20
MODEL, SPECS = "llava-1.5-7b", (None, "trio-soft-33", "trio-soft-11")


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each call; they take turns. Other work on the machine weighs little on them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: median(found) for name, found in times.items()}


def photograph() -> bytes:
    """A JPEG of 640 x 480 as large as a usual one: smooth colours with some noise."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + random.normal(0, 9, (480, 640, 3)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def measure() -> dict[str, Any]:
    """One thread on this machine: a job of tiny-llava by its parts, and what reading and writing take."""
    torch.set_num_threads(1)
    model, processor = zoo.load("tiny-llava")
    answerer = RowAnswerer(model, processor, trio.Pipeline.from_spec(SPEC, model), max_new_tokens=TOKENS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = []
        for number, one in enumerate(examples("test", scenes=ROWS // 6 + 4)[:ROWS]):
            one.image.save(folder / f"{number}.png")
            lines.append({"image": f"{number}.png", "question": one.question, "answer": one.answer})
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = open_rows(file)
        rows = list(source.rows())
        groups = [rows[n : n + BATCH] for n in range(0, ROWS, BATCH)]
        prompts = [[([row.load()], row.question) for row in group] for group in groups]
        inputs = [batch_for(processor, one) for one in prompts]

        def job(number: list[int]) -> None:
            number[0] += 1
            with Shards(folder / f"out{number[0]}", {}) as shards:
                run_job(source, shards, lambda: LocalEngine(answerer, BATCH), shard_rows=64)

        def ask() -> None:
            with answerer.pipeline:
                for one in inputs:
                    generate(model, one, max_new_tokens=TOKENS)

        outputs = [RowOutput(f"row-{n}", "an answer of some words", None, 576, 64.0, 6, True) for n in range(20_000)]

        def write() -> None:
            for begin in range(0, len(outputs), 500):
                shards.write(outputs[begin : begin + 500])

        ask()
        turns, jpeg = [0], photograph()
        with Shards(folder / "written", {}) as shards:
            begin = time.perf_counter()
            write()
            written = (time.perf_counter() - begin) / len(outputs)  # by the clock: it waits for the disk
        found = seconds(
            {
                "read": lambda: list(source.rows()),
                "decode": lambda: [row.load() for row in rows],
                "prepare": lambda: [batch_for(processor, one) for one in prompts],
                "model": ask,
                "job": lambda: job(turns),
                "jpeg": lambda: [clip_input(jpeg) for _ in range(20)],
            }
        )
    return {
        "machine": describe(torch.device("cpu"), torch.float32).model_dump(mode="json"),
        "rows": ROWS,
        "batch": BATCH,
        "parts": {part: found[part] / ROWS for part in ("read", "decode", "prepare", "model")},
        "job": found["job"] / ROWS,
        "write": written,
        "jpeg_bytes": len(jpeg),
        "jpeg": found["jpeg"] / 20,
    }


def clip_input(jpeg: bytes) -> Any:
    """A JPEG as a vision tower of 336 pixels takes it."""
    image = decode_image(jpeg, "image").resize((448, 336), Image.Resampling.BICUBIC).crop((56, 0, 392, 336))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(255)


def needs(spec: str | None, measured: dict[str, Any]) -> list[float]:
    """Numbers of one column: FLOPs and seconds of an image on one GPU, and what the whole job needs beside."""
    shape = published_shape(MODEL)
    made = predict(spec or SPEC, shape, images=(576,), text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS)
    cost = made.full if spec is None else made.compressed
    flops = cost.flops
    speed = PEAK_FLOPS * REACHED_FLOPS
    tower = (flops.tower + flops.projector + flops.compression) / speed
    prefill = (flops.prefill + flops.scoring + flops.selection) / speed
    steps = NEW_TOKENS - 1
    weights = made.full.flops.decode / steps  # 2 FLOPs and, in bfloat16, 2 bytes a weight
    step = (weights / DECODE_BATCH + cost.kv_bytes) / (BANDWIDTH * REACHED_BANDWIDTH)
    each = tower + prefill + steps * step
    rate = GPUS / each
    return [
        1e3 * tower,
        1e3 * prefill,
        1e3 * steps * step,
        1 / each,
        rate,
        IMAGES / rate / 3600,
        measured["jpeg"] / each,
        rate * measured["jpeg_bytes"] / 1e6,
        100 * rate * measured["write"],
    ]


NAMES = (
    ("tower and projector, ms", ".2f"),
    ("prefill with scoring, ms", ".2f"),
    (f"{NEW_TOKENS - 1} decode steps in batches of {DECODE_BATCH}, ms", ".2f"),
    ("images a second, one GPU that never waits", ".0f"),
    (f"images a second, {GPUS} such GPUs", ",.0f"),
    (f"hours for {IMAGES:,} images", ".1f"),
    ("CPU cores that decode, for each GPU", ".2f"),
    ("MB a second to read, all together", ",.0f"),
    ("of the one process that writes, percent busy", ".0f"),
)


def table(measured: dict[str, Any]) -> str:
    """The measured block of the page."""
    parts, whole = measured["parts"], measured["job"]
    total = sum(parts.values()) + measured["write"]
    rows = [*parts.items(), ("write", measured["write"]), ("sum", total), ("the job, measured", whole)]
    small = [table_head(["part", "CPU ms a row"])] + [table_row([name, f"{1e3 * value:.3f}"]) for name, value in rows]
    columns: Sequence[list[float]] = [needs(spec, measured) for spec in SPECS]
    large = [table_head(["", *(f"`{spec}`" if spec else "full" for spec in SPECS)])]
    large += [
        table_row([name, *(format(column[number], form) for column in columns)])
        for number, (name, form) in enumerate(NAMES)
    ]
    said = (
        f"`tiny-llava` with `{SPEC}`, {measured['rows']} rows in batches of {measured['batch']}, one thread: the job "
        f"takes {whole / total:.2f} times the sum of its parts."
    )
    return "\n".join([BEGIN, "", said, "", *small, "", f"{MODEL}, by formula:", "", *large, "", END])


def main() -> None:
    """Measures, or writes the page's block."""
    if "--table" not in sys.argv:
        RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    write_block(PAGE, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
