"""`trio batch`: many images with a question each, answered once each, on this machine or on a Ray cluster."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DEFAULT_SPEC
from .common import (
    OUT,
    BatchSize,
    Device,
    DType,
    DTypeName,
    Json,
    MaxNewTokens,
    ModelName,
    RayAddress,
    RayWorkers,
    SpecName,
    WorkerCpus,
    WorkerGpus,
)

if TYPE_CHECKING:
    from ..batch import BatchSummary, Engine


class BatchEngine(StrEnum):
    """What answers the rows."""

    transformers = "transformers"
    vllm = "vllm"


def batch(
    data: Annotated[
        Path,
        typer.Option("--input", help="Table (.jsonl, .parquet: id, image, question, answer) or folder with images."),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="Folder for the answers; may be begun, and is then gone on with.")],
    model: ModelName = "tiny-llava",
    spec: SpecName = DEFAULT_SPEC,
    question: Annotated[str | None, typer.Option("--question", "-q", help="For rows without one of their own.")] = None,
    workers: RayWorkers = 1,
    ray: RayAddress = None,
    worker_cpus: WorkerCpus = 1.0,
    worker_gpus: WorkerGpus = None,
    ordered: Annotated[bool, typer.Option("--ordered", help="With --ray: answers in the order of the rows.")] = False,
    engine: Annotated[BatchEngine, typer.Option(help="What answers the rows.")] = BatchEngine.transformers,
    batch_size: BatchSize = 8,
    max_new_tokens: MaxNewTokens = 32,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows in a file of answers.")] = 500,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Answer many rows, an image and a question each; every row comes out exactly once, with its answer or an error.

    A job that was stopped goes on where it was when the same command is given again.
    """
    from .. import load_spec
    from ..batch import Shards, open_rows, run_job
    from ..errors import InputError
    from ..integrations.vllm.jobs import VllmEngine, check_engine
    from ..zoo.find import find_model
    from .common import print_json, progress_bar, say, write_text

    if engine is BatchEngine.vllm:
        alone = {"--ray": ray is not None, "--workers": workers > 1, "--device": device != "auto"}
        if wrong := [name for name, given in alone.items() if given]:
            raise InputError(f"{wrong[0]}: not with --engine vllm, which takes this machine's devices; leave it out.")
    if ray is None and (workers > 1 or ordered):
        raise InputError(
            f"--{'workers' if workers > 1 else 'ordered'}: it is for a Ray cluster; add --ray local (or an address), "
            "or leave it out: one worker answers in the order of the rows."
        )
    loaded = load_spec(spec)
    find_model(model)  # a wrong name should not cost a walk through the table
    if engine is BatchEngine.vllm:
        check_engine(loaded)
    settings: dict[str, Any] = {
        "model": model,
        "spec": loaded.model_dump(mode="json"),
        "dtype": dtype.value,
        "max_new_tokens": max_new_tokens,
        "question": question,
        "ordered": ordered,
    }
    if engine is BatchEngine.vllm:
        settings["engine"] = engine.value
    options = {"max_new_tokens": max_new_tokens, "dtype": dtype.value, "device": device}

    def make() -> Engine:
        if engine is BatchEngine.vllm:
            return VllmEngine(model, settings["spec"], batch_size, max_new_tokens, dtype.value)
        if ray is None:
            return _local(model, settings["spec"], batch_size, options)
        from ..integrations.ray import RayEngine

        folder = data.resolve().parent
        given = {"model": model, "spec": settings["spec"], "question": question, "folder": str(folder), **options}
        return RayEngine(given, workers, batch_size, ray, ordered, worker_cpus, worker_gpus)

    source, begin = open_rows(data, question), time.perf_counter()
    try:
        with (
            _terminated_as_stopped(),
            Shards(out, settings) as shards,
            progress_bar(f"{model}: rows", rate=True) as progress,
        ):
            summary = run_job(source, shards, make, shard_rows=shard_rows, progress=progress)
    except KeyboardInterrupt:
        say("trio: stopped; give the same command again, and it goes on where it was.", err=True)
        raise typer.Exit(130) from None
    write_text(out / "summary.json", summary.to_json(indent=1) + "\n", "--out")
    if as_json:
        print_json(json.loads(summary.to_json()))
        return
    _print(summary, time.perf_counter() - begin)
    say(f"written to {out}: part-*.jsonl, summary.json")


@contextmanager
def _terminated_as_stopped() -> Iterator[None]:
    """Lets SIGTERM, which schedulers send, end the block as Ctrl-C does: what is answered is written."""
    if threading.current_thread() is not threading.main_thread():  # no other may set what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _local(model: str, spec: Any, batch_size: int, options: dict[str, Any]) -> Engine:
    from ..batch import LocalEngine, RowAnswerer
    from ..pipeline import Pipeline
    from .common import load_model

    network, processor = load_model(model, dtype=options["dtype"], device=options["device"])
    pipeline = Pipeline.from_spec(spec, network)
    answerer = RowAnswerer(network, processor, pipeline, max_new_tokens=options["max_new_tokens"])
    return LocalEngine(answerer, batch_size)


def _print(summary: BatchSummary, seconds: float) -> None:
    """The summary, a line each."""
    from .common import say

    say(f"rows: {summary.rows}, answered {summary.answered}, errors {summary.errors} ({seconds:.0f} s in this run)")
    for name, reason in summary.examples.items():
        say(f"  error in row {name}: {reason}")
    if summary.accuracy is not None:
        say(f"right: {summary.right} of {summary.known} ({summary.accuracy:.1%}); rows with an error count as wrong")
    say(
        f"visual tokens of a row: {summary.visual_tokens:.1f}, kept {summary.kept:.1f} on average over the layers; "
        f"new tokens: {summary.new_tokens}"
    )
