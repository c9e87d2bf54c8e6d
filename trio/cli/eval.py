"""`trio eval`: how much of what a model knew is left, measured with every control."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DEFAULT_SPEC
from .common import OUT, BatchSize, Device, DType, DTypeName, Force, Json, ModelName, SpecNames

if TYPE_CHECKING:
    from ..measure.evaluation.results import EvaluationResults
    from ..measure.evaluation.task import Task


class QuestionSource(StrEnum):
    """Where the questions come from."""

    shapesvqa = "shapesvqa"
    jsonl = "jsonl"


class Split(StrEnum):
    """Splits of ShapesVQA."""

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
        int | None, typer.Option(min=1, help="Scenes (shapesvqa; default 150) or lines (jsonl; default all).")
    ] = None,
    split: Annotated[Split, typer.Option(help="For shapesvqa: which scenes.")] = Split.test,
    seed: Annotated[
        int | None, typer.Option(help="For shapesvqa: scenes drawn from another seed than the data set's own.")
    ] = None,
    batch_size: BatchSize = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="For jsonl: longest answer, in tokens.")] = 32,
    baseline: Annotated[
        str | None, typer.Option(help="Spec that all others are compared with. Default: the first of each budget.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0.0, help="Of the non-inferiority test, in points.")] = 1.0,
    speed_rounds: Annotated[int, typer.Option(min=0, help="Rounds of measuring times; 0: none.")] = 5,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html (needs matplotlib).")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Ask a model many questions with every spec and every control; write tables, statistics and a report.

    A run that was stopped goes on where it was when the same command is given again, and gives the same results; more
    specs may be added to a finished one.
    """
    from ..measure.evaluation.protocol import check_baseline, named_specs
    from ..measure.evaluation.protocol import evaluate as run
    from .common import load_model, print_json, progress_bar, say, write_text
    from .tables import console

    specs = named_specs(spec or [DEFAULT_SPEC])  # before the model: a wrong name should not cost a minute
    check_baseline(baseline, specs)
    _check_out(out, force)
    if html:
        from ..measure.evaluation.figures import check_matplotlib
        from ..measure.extras import require

        check_matplotlib()
        require("jinja2", "report.html")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    questions = None if task is QuestionSource.shapesvqa else _jsonl(data, limit, max_new_tokens)
    network, processor = load_model(model, dtype=dtype.value, device=device)
    if questions is None:
        questions = _shapesvqa(network, data, limit, split, seed)
    try:
        with progress_bar(f"{model}: {len(questions.samples)} questions") as progress:
            results = run(
                network,
                processor,
                questions,
                specs,
                out=out,
                name=model,
                batch_size=batch_size,
                baseline=baseline,
                margin=margin,
                speed_rounds=speed_rounds,
                progress=progress,
            )
    except KeyboardInterrupt:
        say("trio: stopped; give the same command again, and it goes on where it was.", err=True)
        raise typer.Exit(130) from None
    written = _write(results, out)
    if html:
        from ..measure.evaluation.overlays import overlays
        from ..measure.evaluation.report import report_html

        page = report_html(results, overlays(network, processor, questions, specs, results))
        write_text(out / "report.html", page, "--out")
        written.append("report.html")
    if as_json:
        print_json(json.loads(results.to_json()))
        return
    _print(results)
    console().print(f"written to {out}: {', '.join(written)}", soft_wrap=True, markup=False)


def _check_out(out: Path, force: bool) -> None:
    """Refuse a folder with results of another hand; one that was begun has a header, which is compared later."""
    from ..errors import InputError
    from .common import writable

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r}: this is a file; give a folder.")
    if out.is_dir() and not (out / "header.json").exists():
        for name in ("results.json", "results.csv", "report.html"):
            writable(out / name, "--out", force=force)


def _jsonl(data: Path | None, limit: int | None, max_new_tokens: int) -> Task:
    from ..errors import InputError
    from ..measure.evaluation.task import jsonl

    if data is None:
        raise InputError("--data: missing; the task jsonl needs a file of questions, --data FILE.")
    return jsonl(data, limit=limit, max_new_tokens=max_new_tokens)


def _shapesvqa(model: Any, data: Path | None, limit: int | None, split: Split, seed: int | None) -> Task:
    from ..errors import InputError
    from ..measure.shapesvqa.task import DEFAULT_LIMIT, SEED, canvas_for, shapesvqa

    if data is not None:
        raise InputError("--data: shapesvqa draws its own images; leave --data out, or give --task jsonl.")
    return shapesvqa(
        split.value, limit=limit or DEFAULT_LIMIT, canvas=canvas_for(model), seed=SEED if seed is None else seed
    )


def _write(results: EvaluationResults, out: Path) -> list[str]:
    from .common import write_text

    write_text(out / "results.json", results.to_json(), "--out")
    write_text(out / "results.csv", results.to_csv(), "--out")
    return ["results.json", "results.csv"]


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
