"""`trio eval`: how much of what a model knew is left, measured with every control."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import DEFAULT_SPEC
from .common import (
    OUT,
    BatchSize,
    Device,
    DType,
    DTypeName,
    Force,
    Json,
    ModelName,
    RayAddress,
    RayWorkers,
    SpecNames,
    WorkerCpus,
    WorkerGpus,
)

if TYPE_CHECKING:
    from ..integrations.ray import RayEvaluation
    from ..measure.evaluation.results import EvaluationResults


class QuestionSource(StrEnum):
    """Where the questions come from."""

    shapesvqa = "shapesvqa"
    documents = "documents"
    jsonl = "jsonl"


class SliceChoice(StrEnum):
    """Slices of ShapesVQA that are one question about one image."""

    describe = "describe"
    counting = "counting"


class Split(StrEnum):
    """Splits of what is drawn."""

    test = "test"
    validation = "validation"
    novel = "novel"


def evaluate(
    out: Annotated[Path, typer.Option(*OUT, help="Folder for answers, results and report; may be begun.")],
    spec: SpecNames = None,
    model: ModelName = "tiny-llava",
    task: Annotated[QuestionSource, typer.Option("--task", help="What is asked.")] = QuestionSource.shapesvqa,
    data: Annotated[
        Path | None, typer.Option("--data", help='For jsonl: lines {"image": PATH, "question": TEXT, "answer": TEXT}.')
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Scenes (shapesvqa; default 150), documents (default 80) or lines (jsonl; default all)."
        ),
    ] = None,
    split: Annotated[
        Split, typer.Option(help="For shapesvqa and documents (which have no split novel): which of them.")
    ] = Split.test,
    part: Annotated[
        SliceChoice | None, typer.Option("--slice", help="For shapesvqa: a slice where dropping tokens hurts.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="For shapesvqa and documents: drawn from another seed than the task's own.")
    ] = None,
    dpi: Annotated[
        int | None, typer.Option(help="For documents: pixels an inch, 75 to 200 (default 100, A4 is 826 x 1169).")
    ] = None,
    batch_size: BatchSize = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="For jsonl: longest answer, in tokens.")] = 32,
    baseline: Annotated[
        str | None, typer.Option(help="Spec that all others are compared with. Default: the first of each budget.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0.0, help="Of the non-inferiority test, in points.")] = 1.0,
    sizes: Annotated[
        str | None,
        typer.Option(help="Also the full model on smaller images: shares of their tokens, such as 75%,50%,33%."),
    ] = None,
    speed_rounds: Annotated[int, typer.Option(min=0, help="Rounds of measuring times; 0: none.")] = 5,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html (needs matplotlib).")] = True,
    ray: RayAddress = None,
    workers: RayWorkers = 1,
    worker_cpus: WorkerCpus = 1.0,
    worker_gpus: WorkerGpus = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Ask a model many questions with every spec and every control; write tables, statistics and a report.

    A run that was stopped goes on where it was when the same command is given again, and gives the same results; more
    specs may be added to a finished one. Several processes share the work, with the same results: on Ray (--ray), or
    begun on this machine by `accelerate launch --num_processes N -m trio.cli eval ...`.
    """
    from ..errors import TrioError
    from ..measure.evaluation.job import EvaluationJob
    from ..measure.evaluation.processes import joined, launched
    from ..measure.evaluation.protocol import named_specs
    from .common import print_json, progress_bar, say
    from .tables import console

    processes = launched()
    try:
        job = EvaluationJob(
            specs=tuple(named_specs(spec or [DEFAULT_SPEC])),
            out=out,
            model=model,
            task=task.value,
            data=data,
            limit=limit,
            split=split.value,
            part=None if part is None else part.value,
            seed=seed,
            dpi=dpi,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            baseline=baseline,
            margin=margin,
            sizes=_shares(sizes),
            speed_rounds=speed_rounds,
            html=html,
            threads=threads,
            dtype=dtype.value,
            device=device,
        )
        job.check()  # before the model: a wrong name should not cost a minute
        _check_out(out, force)
        cluster = _cluster(ray, workers, worker_cpus, worker_gpus, processes.count)
        with progress_bar(f"{model}: batches") as progress:
            if cluster is not None:
                results = cluster.evaluate(job, progress)
            else:
                with joined(processes):
                    results = job.run(processes, progress if processes.first else None)
    except KeyboardInterrupt:
        if processes.first:
            say("trio: stopped; give the same command again, and it goes on where it was.", err=True)
        raise typer.Exit(130) from None
    except TrioError:
        if processes.first:
            raise
        raise typer.Exit(2) from None  # the first of the processes says it
    if not processes.first:
        return
    if as_json:
        print_json(json.loads(results.to_json()))
        return
    _print(results)
    console().print(f"written to {out}: {', '.join(job.files)}", soft_wrap=True, markup=False)


def _cluster(ray: str | None, workers: int, cpus: float, gpus: float | None, processes: int) -> RayEvaluation | None:
    """Who evaluates on Ray; None without it."""
    from ..errors import InputError

    if ray is None:
        if workers > 1:
            raise InputError(
                "--workers: it is for a Ray cluster; add --ray local (or an address), or begin several processes on "
                "this machine: accelerate launch --num_processes N -m trio.cli eval ..."
            )
        return None
    if processes > 1:
        raise InputError(
            f"--ray: a launcher began {processes} processes of this command; leave --ray out, or give the command "
            "without the launcher."
        )
    from ..integrations.ray import RayEvaluation

    return RayEvaluation(workers, ray, cpus, gpus)


def _shares(text: str | None) -> tuple[float, ...]:
    """Percentages with commas between them, as shares."""
    from ..errors import InputError
    from ..measure.evaluation.protocol import check_sizes
    from ..spec.rules import parse_share

    try:
        shares = tuple(float(parse_share(one)) for one in text.split(",")) if text else ()
        check_sizes(shares)
    except (ValueError, InputError):
        raise InputError(
            f"--sizes {text!r}: give shares of an image's visual tokens above 0% and up to 100%, such as 75%,50%,33%."
        ) from None
    return shares


def _check_out(out: Path, force: bool) -> None:
    """Refuse a folder with results of another hand; one that was begun has a header, which is compared later."""
    from ..errors import InputError
    from .common import writable

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r}: this is a file; give a folder.")
    if out.is_dir() and not (out / "header.json").exists():
        for name in ("results.json", "results.csv", "report.html"):
            writable(out / name, "--out", force=force)


def _print(results: EvaluationResults) -> None:
    """The table, the gate and the comparisons."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from ..measure.evaluation import wording
    from .tables import console, print_table

    out = console()
    for title, header, rows in (wording.short_table(results), wording.gate_table(results)):
        table = Table(title=Text(title), title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 1))
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        print_table(out, table)
    for line in [*wording.findings(results), *(f"note: {note}" for note in results.notes)]:
        out.print(Text(line))
