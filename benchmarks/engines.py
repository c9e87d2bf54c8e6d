"""Which compressor engines get by default: those that the plugin for vLLM serves, on validation scenes.

``python -m benchmarks.engines MODEL`` asks each as it is served and writes ``benchmarks/results/engine-MODEL.json``, in
the format of `trio eval`, with no control but the full model; answers are kept under ``runs/``. docs/choose-a-spec.md
gets the table by ``python -m benchmarks.results``. What ships is judged on test scenes in `benchmarks.evaluate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer

import trio
from benchmarks.evaluate import COMPRESSORS, RESULTS, SHARES, alone, console, fits
from trio import zoo
from trio.integrations.vllm.settings import COMPRESSORS_TESTED
from trio.measure.evaluation import shapesvqa
from trio.measure.evaluation.answers import AnswerFiles, RowAnswer
from trio.measure.evaluation.protocol import weights
from trio.measure.evaluation.results import OVERALL, EvaluationResults, RowResult
from trio.measure.evaluation.rows import EvaluationRow
from trio.measure.evaluation.runner import Runner
from trio.measure.evaluation.summary import right_of
from trio.measure.evaluation.task import Task
from trio.measure.shapesvqa.task import canvas_for
from trio.measure.statistics import Bootstrap

BUDGETS = {"50": "50%", **SHARES}


def specs() -> Iterator[dict[str, Any]]:
    """The compressors that the plugin serves: numbered as the family numbers, without newlines."""
    for compressor in COMPRESSORS:
        if compressor["name"] in COMPRESSORS_TESTED:
            # vLLM does not load the block behind the features of LLaVA's tower
            layer = {"layer": -2} if compressor["name"] == "prumerge" else {}
            yield from alone({**compressor, **layer}, BUDGETS, positions="auto", newlines="never")


def measure(name: str, scenes: int, batch_size: int) -> EvaluationResults:
    """Asks the full model and every compressor at every budget."""
    model, processor = zoo.load(name)
    task = shapesvqa("validation", limit=scenes, canvas=canvas_for(model))
    chosen = [trio.load_spec(spec) for spec in specs() if fits(spec, model)]
    rows = [EvaluationRow("full", "full", "full")]
    rows += [EvaluationRow(spec.name, spec.name, spec=spec) for spec in chosen]
    runner = Runner(model, processor, task, batch_size)
    facts = {"name": name, "weights": weights(model), "dtype": "float32", "layers": len(runner.adapter.layers)}
    asked = {"name": task.name, "version": task.version, **task.facts, "sha256": task.fingerprint()}
    versions = {"trio-vlm": trio.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about = {"model": facts, "task": asked, "versions": versions, "batch_size": batch_size}
    answers = runner.run(rows, AnswerFiles(Path("runs") / f"engine-{name}", about), told)
    return EvaluationResults(
        model={**facts, "visual_tokens": round(fmean(answer.tokens for answer in answers["full"]))},
        task={
            **asked,
            "questions": len(task.samples),
            "scenes": task.scenes,
            "kinds": dict(Counter(sample.kind for sample in task.samples)),
        },
        settings={"batch_size": batch_size, "margin": 1.0},
        versions=versions,
        rows=[result(row, answers[row.name], task) for row in rows],
        gates=[],
        comparisons=[],
        questions={"scene": [s.scene for s in task.samples], "kind": [s.kind for s in task.samples]},
        right={row.name: right_of(task, answers[row.name]) for row in rows},
    )


def result(row: EvaluationRow, answers: list[RowAnswer], task: Task) -> RowResult:
    """What a row kept, cost and answered, over all questions."""
    right = np.asarray([character == "1" for character in right_of(task, answers)], float)
    accuracy = Bootstrap([sample.scene for sample in task.samples]).mean(right).scaled(100, 3)
    costs = [answer.answer_flops for answer in answers if answer.answer_flops is not None]
    return RowResult(
        name=row.name,
        control=row.control,
        spec=None if row.spec is None else row.spec.to_dict(),
        draws=[row.name],
        tokens=round(fmean(answer.tokens for answer in answers), 2),
        average=round(fmean(answer.average for answer in answers), 2),
        answer_flops=round(fmean(costs)) if len(costs) == len(answers) else None,
        accuracy={OVERALL: accuracy},
    )


def told(done: int, total: int) -> None:
    """Says how far it is, now and then."""
    if done % 100 == 0:
        console.print(f"{done} of {total} batches")


def main(
    name: Annotated[str, typer.Argument(help="Zoo model.")],
    scenes: Annotated[int, typer.Option(help="Scenes.")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(threads)
    (RESULTS / f"engine-{name}.json").write_text(measure(name, scenes, batch_size).to_json())


if __name__ == "__main__":
    typer.run(main)
