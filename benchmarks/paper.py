"""One row of the paper's tables on your checkpoint: lmms-eval runs what is missing, beside what was published.

``python -m benchmarks.paper --model llava-hf/llava-v1.6-vicuna-7b-hf --table llava-next --row trio-320`` runs one task
of lmms-eval after the other, each into a folder of its own below ``--out``: a run that was stopped goes on, and tasks
that are done are not run again. Run the row ``full`` too: percents and speed-ups are relative to it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.expected import ALL_SOURCES, HERE, SOURCES, Source, average_percent, measured
from benchmarks.expected.tables import TABLES, PaperRow, PaperTable, table_of
from trio.cost import predict, shape_of
from trio.errors import InputError, TrioError, UnknownNameError, did_you_mean
from trio.zoo.find import find_model

FULL = "full"
#: Text tokens beside an image where FLOPs are counted.
TEXT = 64


@dataclass(frozen=True)
class Job:
    """One task of lmms-eval for one row.

    Attributes:
        column: of the table.
        command: arguments of lmms-eval.
        folder: where its results go.
        asked: what the results depend on, beside the task.
    """

    column: str
    command: tuple[str, ...]
    folder: Path
    asked: Mapping[str, Any]

    @property
    def record(self) -> Path:
        """The file that says what was asked."""
        return self.folder / "asked.json"

    def results(self) -> dict[str, Any] | None:
        """What lmms-eval has written; None where the task is not done.

        Raises:
            InputError: it was asked otherwise: another checkpoint, other arguments, or fewer questions.
        """
        files = sorted(self.folder.rglob("*_results.json"))
        if not files:
            return None
        before = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else "nobody knows what"
        if before != self.asked:
            raise InputError(
                f"{str(self.folder)!r}: it holds results of {before}, and not of {dict(self.asked)}; give another "
                "--out, or remove the folder."
            )
        return dict(json.loads(files[-1].read_text(encoding="utf-8")))


def jobs(
    table: PaperTable,
    row: PaperRow,
    model: str,
    out: Path,
    *,
    sources: Mapping[str, Source],
    include: Path,
    batch_size: int = 8,
    limit: int | None = None,
    arguments: Sequence[str] = (),
) -> list[Job]:
    """The tasks of a row, one job each.

    Args:
        table: of the row.
        row: what runs.
        model: zoo name, folder or hub name.
        out: folder of all results of this table and row.
        sources: a task for each column.
        include: folder with tasks that lmms-eval does not have.
        batch_size: requests in one `generate`.
        limit: questions of a task; all by default.
        arguments: further ``--model_args``; they replace the table's own.
    """
    given = ",".join((f"pretrained={model}", f"spec={row.spec}", *(arguments or table.arguments)))
    options = [
        "--model",
        "trio",
        "--model_args",
        given,
        "--batch_size",
        str(batch_size),
        "--include_path",
        str(include),
    ]
    options += [] if limit is None else ["--limit", str(limit)]
    return [
        Job(
            column,
            (*options, "--tasks", source.task, "--output_path", str(out / source.task)),
            out / source.task,
            {"model_args": given, "limit": limit},
        )
        for column, source in sources.items()
    ]


def run(job: Job) -> dict[str, Any]:
    """Runs a task that is not done.

    Raises:
        InputError: lmms-eval has written no results (it ends with 0 all the same); its last lines are in the message.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    job.record.write_text(json.dumps(job.asked, indent=1) + "\n", encoding="utf-8")
    log = job.folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        subprocess.run([sys.executable, "-m", "lmms_eval", *job.command], stdout=file, stderr=file, check=False)
    found = job.results()
    if found is None:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise InputError(f"task {job.folder.name}: lmms-eval gave no results ({' / '.join(tail)}); see {log}.")
    return found


@dataclass(frozen=True)
class RunCost:
    """What a row took in its own runs, summed over tasks.

    Attributes:
        seconds: of `generate` and all around it.
        answers: questions answered.
        tokens: new tokens.
        visual: visual tokens of a question, mean; 0 where the full model ran, which counts none.
        kept: of those, averaged over the layers.
    """

    seconds: float
    answers: int
    tokens: int
    visual: float
    kept: float


def cost_of(found: Mapping[str, Mapping[str, Any]]) -> RunCost:
    """The cost of a row from the results of its tasks."""
    speeds = {name: results.get("throughput", {}) for name, results in found.items()}
    counts = {
        name: sum(int(one["effective"]) for one in results.get("n-samples", {}).values())
        for name, results in found.items()
    }
    answers = sum(counts.values())
    visual = sum(counts[name] * float(one.get("avg_visual_tokens", 0)) for name, one in speeds.items())
    kept = sum(
        counts[name] * float(one.get("avg_visual_tokens", 0)) * float(one.get("avg_retention", 1))
        for name, one in speeds.items()
    )
    return RunCost(
        sum(float(one.get("total_elapsed_time", 0)) for one in speeds.values()),
        answers,
        sum(int(one.get("total_gen_tokens", 0)) for one in speeds.values()),
        visual / max(answers, 1),
        kept / max(answers, 1),
    )


def costs(row: PaperRow, config: Any, ours: RunCost, full: RunCost | None) -> list[tuple[str, str, str]]:
    """Lines of cost: what it is, as published, as found here; counted for an image of the mean number of tokens.

    Args:
        row: of the table.
        config: of the checkpoint.
        ours: of the row's own runs.
        full: of the untouched model's; None where it was not run.
    """
    said = row.cost
    lines = [("visual tokens kept", None, f"{ours.kept:.1f} of {ours.visual:.1f}" if ours.visual else "")]
    if row.spec == "none":
        return [(what, "", found) for what, _, found in lines]
    faster = full.seconds * ours.answers / (full.answers * ours.seconds) if full and ours.seconds else None
    prediction = None
    if ours.visual:
        new = max(1, round(ours.tokens / ours.answers))
        prediction = predict(row.spec, shape_of(config), images=(round(ours.visual),), text_tokens=TEXT, new_tokens=new)
    found = (
        ("time of an answer", said and said.total, faster),
        ("FLOPs by FastV's formula", said and said.flops, prediction and prediction.paper_reduction),
        ("FLOPs of the whole model", None, prediction and prediction.flops_reduction),
        ("KV cache", said and said.kv, prediction and prediction.kv_reduction),
    )
    return [
        *((what, "", text) for what, _, text in lines),
        *((what, _times(there), _times(here)) for what, there, here in found),
        ("prefill", _times(said and said.prefill), "trio bench"),
    ]


def report(
    table: PaperTable,
    row: PaperRow,
    found: Mapping[str, Mapping[str, Any]],
    full: Mapping[str, Mapping[str, Any]],
    config: Any,
    sources: Mapping[str, tuple[Source, ...]] = ALL_SOURCES,
) -> Table:
    """Published, measured and difference for each column, and the costs of the same runs.

    Args:
        table: of the paper.
        row: of it.
        found: lmms-eval's results by task.
        full: those of the row ``full``; empty where it was not run.
        config: of the checkpoint.
        sources: tasks of the columns.
    """
    ours, base, theirs = _scores(found, sources), _scores(full, sources), table.scores(row)
    out = Table(title=f"{table.checkpoint}: {row.spec}", title_justify="left", title_style="", header_style="bold")
    for name in ("", "published", "here", "difference"):
        out.add_column(name, justify="right" if name else "left")
    for column in table.columns:
        there, here = theirs.get(column), ours.get(column)
        out.add_row(column, _number(there), _number(here), _difference(there, here))
    shared = [name for name in ours if base.get(name)]
    if shared:
        there, here = theirs.get("average_percent"), average_percent(ours, base, shared)
        of_paper = set(shared) == set(SOURCES)  # the published mean is over these
        label = f"% of the full model, mean of {len(shared)}"
        said = _number(there) if of_paper or there is None else f"{there:.1f} of {len(SOURCES)}"
        out.add_row(label, said, _number(here), _difference(there, here) if of_paper else "")
    out.add_section()
    for what, said, seen in costs(row, config, cost_of(found), cost_of(full) if full else None):
        out.add_row(what, said, seen, "")
    return out


def _scores(found: Mapping[str, Mapping[str, Any]], sources: Mapping[str, tuple[Source, ...]]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for results in found.values():
        scores |= {name: value for name, (value, _) in measured(results, sources).items()}
    return scores


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _difference(there: float | None, here: float | None) -> str:
    return "" if there is None or here is None else f"{here - there:+.1f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def done(asked: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The results of the jobs that are done, by task; errors as `Job.results`."""
    return {job.folder.name: results for job in asked if (results := job.results()) is not None}


def _asked(table: PaperTable, columns: Sequence[str] | None) -> dict[str, Source]:
    for column in columns or ():
        if column not in table.columns:
            raise UnknownNameError(
                f"column: found {column!r}. {did_you_mean(column, table.columns)}Allowed: {', '.join(table.columns)}."
            )
    return {column: ALL_SOURCES[column][0] for column in columns or table.columns}


def main(
    model: Annotated[str, typer.Option(help="Zoo model, folder or hub name.")],
    table: Annotated[str, typer.Option(help=f"One of {', '.join(TABLES)}.")] = "llava-next",
    row: Annotated[str, typer.Option(help="Row of the table; full: the untouched model.")] = "trio-320",
    column: Annotated[list[str] | None, typer.Option(help="Benchmark; may be repeated. All by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/paper"),
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one generate.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of a benchmark.")] = None,
    model_args: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; they replace the table's own.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the commands, run nothing.")] = False,
) -> None:
    """Run what is missing of a row and print it beside what was published."""
    console = Console()
    try:
        of = table_of(table)
        if row not in of.rows:
            raise UnknownNameError(f"row: found {row!r}. {did_you_mean(row, of.rows)}Allowed: {', '.join(of.rows)}.")
        found, base = (
            jobs(
                of,
                of.rows[name],
                model,
                out / table / name,
                sources=_asked(of, column),
                include=HERE / "tasks",
                batch_size=batch_size,
                limit=limit,
                arguments=model_args or (),
            )
            for name in (row, FULL)
        )
        if dry_run:
            for job in found:
                typer.echo(shlex.join(["python", "-m", "lmms_eval", *job.command]))
            return
        for number, job in enumerate(found, start=1):
            state = "done" if job.results() is not None else "running"
            console.print(f"{number} of {len(found)}: {job.folder.name}: {state}")
            if state == "running":
                run(job)
        full = {} if row == FULL else done(base)
        console.print(report(of, of.rows[row], done(found), full, _config(model)))
        for text in (of.remark, "" if full or row == FULL else f"run --row {FULL} too: percents are relative to it"):
            if text:
                console.print(f"note: {text}")
    except TrioError as error:
        typer.echo(f"paper: {error}", err=True)
        raise typer.Exit(2) from None


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(find_model(model))


if __name__ == "__main__":
    typer.run(main)
