"""An evaluation as plain settings: what the command line asks for, in one process or in many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...errors import InputError
from ...spec import PipelineSpec
from ...zoo.checkpoint import load_model
from ..documents.task import DEFAULT_DPI, check_documents, documents
from ..documents.task import DEFAULT_LIMIT as DOCUMENTS
from ..documents.task import SEED as DOCUMENTS_SEED
from ..extras import require
from ..shapesvqa.slices import slice_task
from ..shapesvqa.task import DEFAULT_LIMIT, SEED, canvas_for, shapesvqa
from .processes import ALONE, Processes
from .protocol import check_baseline, evaluate
from .results import EvaluationResults
from .task import Task, jsonl

__all__ = ["EvaluationJob"]

TaskName = Literal["shapesvqa", "documents", "jsonl"]


@dataclass(frozen=True)
class EvaluationJob:
    """All that an evaluation depends on; it can be pickled.

    Attributes:
        specs: each with a name of its own.
        out: folder for answers, results and report.
        model: of the zoo, a folder, or a name on the hub.
        task: what is asked.
        data: file with the questions of the task ``jsonl``.
        limit: scenes, documents or lines; None: the task's own number.
        split: of ShapesVQA or the documents.
        part: a slice of ShapesVQA, see `trio.measure.shapesvqa.slices`; None: the data set.
        seed: of what is drawn; None: the task's own.
        dpi: pixels an inch of the documents; None: the task's own.
        batch_size: questions in a batch.
        max_new_tokens: longest answer to the questions of a file.
        baseline: spec that all others are compared with.
        margin: of the non-inferiority test, in points.
        sizes: shares of an image's visual tokens at which the full model is asked, too.
        speed_rounds: rounds of measuring times.
        html: whether a report is written.
        threads: CPU threads; None: torch's own choice.
        dtype: number format of the weights.
        device: where to run.
    """

    specs: tuple[PipelineSpec, ...]
    out: Path
    model: str = "tiny-llava"
    task: TaskName = "shapesvqa"
    data: Path | None = None
    limit: int | None = None
    split: Any = "test"
    part: Any = None
    seed: int | None = None
    dpi: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 32
    baseline: str | None = None
    margin: float = 1.0
    sizes: tuple[float, ...] = ()
    speed_rounds: int = 5
    html: bool = True
    threads: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    def check(self) -> None:
        """Refuses before anything is loaded what could not be finished.

        Raises:
            InputError: the baseline is none of the specs, a file of questions is missing, an option belongs to another
                task, the documents cannot be drawn so, or a library for the report is missing.
        """
        check_baseline(self.baseline, self.specs)
        if self.task == "jsonl" and self.data is None:
            raise InputError("data: missing; the task jsonl needs a file of questions.")
        if self.task != "jsonl" and self.data is not None:
            raise InputError(f"data: {self.task} draws its own images; leave it out, or give the task jsonl.")
        if self.task != "documents" and self.dpi is not None:
            raise InputError(f"dpi: {self.task} draws no documents; leave it out, or give the task documents.")
        if self.task != "shapesvqa" and self.part is not None:
            raise InputError(f"slice: it is of the task shapesvqa, not of {self.task}; leave it out.")
        if self.task == "documents":
            check_documents(self.split, self.limit or DOCUMENTS, self.dpi or DEFAULT_DPI)
            require("rapidfuzz", "similarity of answers")
        if self.html:
            from .figures import check_matplotlib

            check_matplotlib()
            require("jinja2", "report.html")

    def run(
        self, processes: Processes = ALONE, progress: Callable[[int, int], None] | None = None
    ) -> EvaluationResults:
        """Evaluates; the first of the processes writes ``results.json``, ``results.csv`` and ``report.html``.

        Args:
            processes: connected ones (`joined`) that run the same job.
            progress: told the finished and all batches.

        Raises:
            TrioError: the model, the questions or a spec cannot be used, or a file cannot be written; in all processes.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model, processor, task = processes.together(lambda: self._load(processes))
        results = evaluate(
            model,
            processor,
            task,
            self.specs,
            out=self.out,
            name=self.model,
            batch_size=self.batch_size,
            baseline=self.baseline,
            margin=self.margin,
            sizes=self.sizes,
            speed_rounds=self.speed_rounds,
            progress=progress,
            processes=processes,
        )
        if processes.first:
            self._write("results.json", results.to_json())
            self._write("results.csv", results.to_csv())
            if self.html:
                from .overlays import overlays
                from .report import report_html

                page = report_html(results, overlays(model, processor, task, self.specs, results))
                self._write("report.html", page)
        return results

    @property
    def files(self) -> list[str]:
        """Names of what is written beside the answers."""
        return ["results.json", "results.csv", *(["report.html"] if self.html else [])]

    def _load(self, processes: Processes) -> tuple[Any, Any, Task]:
        """Model, processor and questions."""
        task = None
        if self.task == "jsonl":
            assert self.data is not None
            task = jsonl(self.data, limit=self.limit, max_new_tokens=self.max_new_tokens)
        elif self.task == "documents":
            task = documents(
                self.split,
                limit=self.limit or DOCUMENTS,
                dpi=self.dpi or DEFAULT_DPI,
                seed=DOCUMENTS_SEED if self.seed is None else self.seed,
            )
        model, processor = load_model(self.model, dtype=self.dtype, device=processes.device(self.device))
        if task is None:
            limit, seed = self.limit or DEFAULT_LIMIT, SEED if self.seed is None else self.seed
            if self.part is None:
                task = shapesvqa(self.split, limit=limit, canvas=canvas_for(model), seed=seed)
            else:
                task = slice_task(self.part, limit, canvas=canvas_for(model), split=self.split, seed=seed)
        return model, processor, task

    def _write(self, name: str, text: str) -> None:
        file = self.out / name
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {str(file)!r}: cannot be written ({error.strerror or error}).") from error
