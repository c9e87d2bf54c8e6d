"""What it saves that images are encoded once for all specs: `trio fidelity` with and without, in pairs.

``python -m benchmarks.reuse`` writes ``benchmarks/results/reuse.json``; ``python -m benchmarks.measured`` puts it into
docs/fidelity.md. What is still computed anew for each spec, the layers in front of its first stage, is counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table

from trio import zoo
from trio.cost import predict, published_shape
from trio.cost.flops import layer_flops
from trio.measure.bench.machine import describe
from trio.measure.encoding import LIMIT
from trio.measure.fidelity import FidelityReport, PromptSample, measure
from trio.measure.shapesvqa.task import canvas_for, shapesvqa
from trio.spec import load_spec
from trio.spec.schedule import resolve

RESULT = Path(__file__).parent / "results" / "reuse.json"
MODELS = ("tiny-llava", "tiny-qwen2.5-vl")
#: None reads the vision tower.
SPECS = ("trio-soft-11", "trio-soft-22", "trio-soft-33", "trio-11")
BATCH, NEW_TOKENS = 4, 2
#: Specs of published shapes, with the visual tokens of an image.
COUNTED: Mapping[str, tuple[str, int]] = {
    "trio-soft-11": ("llava-1.5-7b", 576),
    "trio-llava-1.5-64": ("llava-1.5-7b", 576),
    "trio-llava-next-320": ("llava-next-7b", 2880),
    "trio-qwen2.5-vl-11": ("qwen2.5-vl-7b", 1296),
}
TEXT = 64


def seconds(call: Callable[[], FidelityReport]) -> tuple[FidelityReport, float, float]:
    """What a measurement reports, its seconds by the wall and by the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    report = call()
    return report, time.perf_counter() - wall, time.process_time() - processor


def answers(report: FidelityReport) -> list[Any]:
    """All that a report says beside times."""
    return [report.asked, *((row.spec.agreement, row.floor.agreement, row.gain) for row in report.results)]


def spread(values: Sequence[float]) -> list[float]:
    """Quartiles: low, median, high."""
    return [round(value, 3) for value in quantiles(values, n=4, method="inclusive")]


def measured(name: str, scenes: int, rounds: int) -> dict[str, Any]:
    """One model: encoding anew / encoding once, in pairs whose order alternates, after an uncounted pair."""
    model, processor = zoo.load(name)
    task = shapesvqa("validation", limit=scenes, canvas=canvas_for(model))
    first = {sample.scene: sample for sample in reversed(task.samples)}
    samples = [PromptSample(one.load(), one.question, f"scene {scene}") for scene, one in sorted(first.items())]

    def run(limit: int) -> tuple[FidelityReport, float, float]:
        return seconds(
            lambda: measure(
                model, processor, SPECS, samples, max_new_tokens=NEW_TOKENS, batch_size=BATCH, encoded_bytes=limit
            )
        )

    walls, processors, once = [], [], []
    for number in range(rounds + 1):
        limits = (LIMIT, 0) if number % 2 else (0, LIMIT)
        found = {limit: run(limit) for limit in limits}
        (new, wall, processor_time), (old, wall_anew, processor_anew) = found[LIMIT], found[0]
        if answers(new) != answers(old):
            raise SystemExit(f"{name}: the two say other things")
        if number:
            walls.append(wall_anew / wall)
            processors.append(processor_anew / processor_time)
            once.append(processor_time)
    return {
        "prompts": len(samples),
        "wall": spread(walls),
        "processor": spread(processors),
        "processor_seconds": spread(once),
    }


def repeated(name: str) -> dict[str, Any]:
    """Layers in front of a spec's first stage, and their share of the FLOPs of a prefill with the spec, tower included.

    They see what the full model's see, unless a compressor comes before: then nothing is shared.
    """
    shape_name, tokens = COUNTED[name]
    spec, shape = load_spec(name), published_shape(shape_name)
    depth = 0 if spec.compressor is not None else resolve(spec, shape.layers).layers[0]
    prediction = predict(spec, shape, images=(tokens,), text_tokens=TEXT)
    work = depth * layer_flops(shape, tokens + TEXT)
    return {
        "shape": shape_name,
        "visual_tokens": tokens,
        "depth": depth,
        "share": round(work / prediction.compressed.flops.total, 3),
    }


def table(data: Mapping[str, Any]) -> Table:
    """Both parts as one table."""
    out = Table(title="encoding anew / encoding once, seconds of `trio fidelity`", title_justify="left", title_style="")
    for column in ("", "processor", "wall clock"):
        out.add_column(column, justify="right" if column else "left")
    for name, found in data["models"].items():
        cells = [
            f"{middle:.2f}x ({low:.2f} to {high:.2f})" for low, middle, high in (found["processor"], found["wall"])
        ]
        out.add_row(f"{name}, {found['prompts']} prompts", *cells)
    return out


def lines(data: Mapping[str, Any]) -> list[str]:
    """How it was measured, and what is still repeated."""
    counted = {name: found for name, found in data["repeated"].items() if name != "text_tokens"}
    shares = ", ".join(f"{found['share']:.1%} ({name}, {found['shape']})" for name, found in counted.items())
    return [
        f"median and quartiles of {data['rounds']} pairs; {len(data['specs'])} specs ({', '.join(data['specs'])}), "
        f"batches of {data['batch']}; {data['machine']}",
        f"still computed for each spec: the layers in front of its first stage, by formula {shares} of a prefill with "
        "the spec, tower included",
    ]


def main(
    scenes: Annotated[int, typer.Option(help="Scenes, one prompt of each.")] = 8,
    rounds: Annotated[int, typer.Option(help="Pairs that are counted.")] = 5,
) -> None:
    """Measure both models and count what is repeated."""
    machine = describe(torch.device("cpu"), torch.float32)
    data = {
        "command": f"python -m benchmarks.reuse --scenes {scenes} --rounds {rounds}",
        "specs": list(SPECS),
        "batch": BATCH,
        "new_tokens": NEW_TOKENS,
        "machine": f"{machine.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
        "rounds": rounds,
        "models": {name: measured(name, scenes, rounds) for name in MODELS},
        "repeated": {"text_tokens": TEXT, **{name: repeated(name) for name in COUNTED}},
    }
    RESULT.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
