"""All of the benchmark on an accelerator, within 8 minutes: prefill, decode, batches, growth and a profile.

``python -m benchmarks.gpu`` runs on any CUDA machine with 8 GB (decoder layers share their weights) and
writes ``benchmarks/results/bench-*-cuda.json`` and a profile. Attention is forced
into the flash kernel; where that cannot run, torch says so. ``--device cpu --smoke`` runs the same on a small
model, to try it out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import trio
from benchmarks.naive import naive
from trio.adapters import adapter_for
from trio.cli.bench import print_report
from trio.errors import InputError
from trio.measure.bench import (
    Architecture,
    BenchReport,
    BenchSettings,
    NoisePrompts,
    architecture,
    build,
    config_of,
    measure,
)
from trio.measure.bench.timing import run
from trio.measure.bench.ways import Maker
from trio.spec import load_spec

RESULTS = Path(__file__).parent / "results"
#: Architecture, specs, samples: most telling first, in case time runs out.
PLAN: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("llava-next-7b", ("trio-soft-11", "trio-soft-33", "trio-llava-next-320"), 1),
    ("llava-1.5-7b", ("trio-soft-11", "trio-llava-1.5-64"), 1),
    ("llava-1.5-7b", ("trio-soft-11",), 8),
    ("qwen2.5-vl-7b", ("trio-soft-11",), 1),
    ("llava-next-7b", ("trio-soft-11",), 8),
)
#: Seconds for everything, and for one line of the plan.
TOTAL, EACH = 420.0, 60.0
console = Console(width=140)


def smoke(whole: Architecture) -> Architecture:
    """The same modules, narrow and shallow."""
    text, vision = dict(whole.config["text_config"]), dict(whole.config["vision_config"])
    text |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {
        "num_hidden_layers": 16,
        "vocab_size": 2000,
        "head_dim": 16,
    }
    vision |= {"hidden_size": 32, "intermediate_size": 48}
    if "depth" in vision:
        vision |= {"depth": 6, "num_heads": 4, "out_hidden_size": 64, **{key: [1, 3, 5] for key in whole.by_depth}}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    else:
        vision |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {key: 1900 + place for place, key in enumerate(whole.config) if key.endswith("_token_id")}
    config = {**whole.config, **ids, "text_config": text, "vision_config": vision}
    return replace(whole, config=config, sizes=whole.sizes[-1:])


@contextmanager
def flash(device: str) -> Iterator[None]:
    """Attention by the flash kernel alone, on CUDA."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.startswith("cuda") else nullcontext():
        yield


def benchmark(name: str, specs: tuple[str, ...], samples: int, *, device: str, small: bool) -> tuple[BenchReport, Any]:
    """One line of the plan, and the profile of a compressed prefill."""
    shape = smoke(architecture(name)) if small else architecture(name)
    config = config_of(shape)
    dtype = torch.float32 if small else torch.float16
    model = build(config, dtype=dtype, device=device)
    prompts = NoisePrompts(shape, config)
    loaded = [load_spec(spec) for spec in (specs[:1] if small else specs)]
    settings = BenchSettings(batch=samples, steps=2 if small else 16, rounds=1 if small else 20, seconds=EACH / 2)
    if small:
        settings = replace(settings, search=False)
    report = measure(
        model,
        prompts,
        loaded,
        settings=settings,
        name=name,
        weights="random; decoder layers share them",
        more=lambda maker: naive(maker, loaded[:1]),
        command="python -m benchmarks.gpu",
    )
    return report, profiled(model, prompts, specs[0], samples)


def forced(name: str, specs: tuple[str, ...], samples: int, *, device: str, small: bool) -> tuple[BenchReport, Any]:
    """One line of the plan with the flash kernel alone; where torch has none for a call, with what it chooses."""
    try:
        with flash(device):
            return benchmark(name, specs, samples, device=device, small=small)
    except RuntimeError as error:
        if "kernel" not in str(error).lower() or isinstance(error, torch.OutOfMemoryError):
            raise
        console.print(f"{name}, batch of {samples}: no flash kernel for a call ({error}); torch chooses")
        report, operators = benchmark(name, specs, samples, device=device, small=small)
        return report.model_copy(update={"command": f"{report.command} (flash kernel refused)"}), operators


def profiled(model: Any, prompts: NoisePrompts, spec: str, samples: int) -> list[dict[str, Any]]:
    """The operators of a compressed prefill that take longest, on the device where there is one."""
    maker = Maker(adapter_for(model), prompts, samples=samples, steps=0, shape=None)
    pipeline = trio.Pipeline.from_spec(spec, model, adapter=maker.adapter)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    with pipeline:
        run(model, maker.inputs, 0)
        with profile(activities=activities) as seen:
            run(model, maker.inputs, 0)
    on_device = model.device.type == "cuda"
    rows = [
        {
            "operator": event.key,
            "calls": event.count,
            "ms": round((event.self_device_time_total if on_device else event.self_cpu_time_total) / 1000, 3),
        }
        for event in seen.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:30]


def main(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    small: Annotated[
        bool, typer.Option("--smoke", help="A small model, one round: to see that everything runs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure and write the results."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "benchmarks.gpu: torch finds no CUDA device here; run it on a machine with one, or try it out with "
            "--device cpu --smoke."
        )
    if not device.startswith("cuda") and not small:
        raise InputError(
            f"benchmarks.gpu: on {device!r} whole models take hours; add --smoke, or use benchmarks.speed."
        )
    begin, kind = time.perf_counter(), device.partition(":")[0]
    for name, specs, samples in PLAN:
        if time.perf_counter() - begin > TOTAL:
            console.print(f"left out for lack of time: {name}, batch of {samples}")
            continue
        try:
            report, operators = forced(name, specs, samples, device=device, small=small)
        except torch.OutOfMemoryError as error:
            console.print(f"left out for lack of memory: {name}, batch of {samples}: {error}")
            continue
        print_report(report, console)
        place = out / f"bench-{name}-{samples}-{kind}.json"
        place.write_text(report.to_json(indent=1) + "\n", encoding="utf-8")
        (out / f"profile-{name}-{samples}-{kind}.json").write_text(json.dumps(operators, indent=1) + "\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except trio.TrioError as error:
        raise SystemExit(str(error)) from None
