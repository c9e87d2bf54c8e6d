"""Asks a model all questions in all rows, batch by batch, and goes on where it was stopped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...adapters import adapter_for
from ...core.images import batch_for
from ...core.upstream import MASK, patch_processor
from ...cost import ModelShape, of_report, shape_of
from ...cost.flops import decode_flops
from ...encoders.resizing import resizing_processor
from ...errors import TrioError
from ...pipeline import Pipeline
from ..ahead import prepared
from ..answering import answer_length, decode, generate
from ..encoding import LIMIT, EncodedImages
from ..equal_cost import share_of, whole_cost
from .answers import AnswerFiles, RowAnswer
from .floors import Oracle
from .images import Counter, Shown, without_floor
from .processes import ALONE, Processes
from .rows import EvaluationRow, ImageChoice
from .task import LabelledSample, Task

__all__ = ["Runner"]

#: Images that are looked at for what holds for all of them.
LOOKED_AT = 16
Progress = Callable[[int, int], None]
#: Which images a row shows, and how small.
_Which = tuple[ImageChoice, float, int | str | None]
#: Answers of a row that are there already, and how many batches they are.
_Begun = tuple[list[RowAnswer], int]


class Runner:
    """A model, a task, and how they are brought together."""

    def __init__(self, model: Any, processor: Any, task: Task, batch_size: int, *, encoded_bytes: int = LIMIT) -> None:
        """Lays out the batches: images of one size together, so that little is padded.

        Args:
            model: the model.
            processor: its processor.
            task: the questions.
            batch_size: questions in a batch.
            encoded_bytes: features of a batch's images that are kept for the next row, on the model's device; others
                are encoded again for each.
        """
        self.model, self.processor, self.task = model, processor, task
        self.adapter = adapter_for(model)
        self.small_processor = without_floor(processor)
        self.counter, self.small = (Counter(self.adapter, one) for one in (processor, self.small_processor))
        self.shown = Shown(task, self.counter, self.small)
        self.memory = EncodedImages(self.adapter, limit=encoded_bytes)
        self.shape, self.no_flops = _shape(model)
        sizes = {sample.scene: sample.load().size for sample in task.samples}
        order = sorted(range(len(task.samples)), key=lambda i: (sizes[task.samples[i].scene], i))
        self.batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        self.sizes = list(sizes.values())
        self.size_of = sizes
        #: Whether a smaller image has fewer tokens; where not, averaged tokens stand in for it.
        self.by_size = self.adapter.image_tokens == "by-size" and patch_processor(processor) is not None
        self.smaller = "resize" if self.by_size else "average-pool"

    def run(
        self,
        rows: Sequence[EvaluationRow],
        files: AnswerFiles | None,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> dict[str, list[RowAnswer]]:
        """All answers of all rows, in the order of the questions.

        Several processes take turns: each asks one batch of a round, composed as one process alone would ask it.

        Args:
            rows: rows that are not refused.
            files: where answers are, and are written; None in processes other than the first.
            progress: told the finished and all batches.
            processes: that run this with the same rows.
        """
        first: dict[str, EvaluationRow] = {}  # rows that do the same are asked once
        for row in rows:
            first.setdefault(_key(row), row)
        begun = processes.gather(functools.partial(self._begun, first, files))[0]
        answers_by_key = {key: answers for key, (answers, _) in begun.items()}
        done = {key: number for key, (_, number) in begun.items()}
        finished, total = sum(done.values()), len(first) * len(self.batches)
        pipelines = {key: self.pipeline(row) for key, row in first.items() if row.spec is not None}
        open_rows = [[row for key, row in first.items() if done[key] <= number] for number in range(len(self.batches))]
        left = [number for number, rows in enumerate(open_rows) if rows]
        rounds = [left[begin : begin + processes.count] for begin in range(0, len(left), processes.count)]
        mine = [numbers[processes.rank] for numbers in rounds if processes.rank < len(numbers)]
        work = [([self.task.samples[i] for i in self.batches[number]], open_rows[number]) for number in mine]
        coming = prepared(lambda item: self._prepare(*item), work)
        for numbers in rounds:
            if progress is not None:
                progress(finished, total)
            self.memory.clear()
            number = numbers[processes.rank] if processes.rank < len(numbers) else -1
            inputs = processes.together(functools.partial(next, coming, None))
            for key, row in first.items():
                if done[key] > numbers[-1]:
                    continue
                asked = None if done[key] > number else inputs
                ask = functools.partial(self._answers, row, pipelines.get(key), asked, number)
                for answers in filter(None, processes.gather(ask)):
                    if files is not None:
                        files.add(row.name, key, answers)
                    answers_by_key[key] += answers
                    finished += 1
                    if progress is not None:
                        progress(finished, total)
        return {row.name: sorted(answers_by_key[_key(row)], key=lambda answer: answer.question) for row in rows}

    def _begun(self, rows: Mapping[str, EvaluationRow], files: AnswerFiles | None) -> dict[str, _Begun]:
        """What is answered already, by key; nothing where there are no files."""
        return {} if files is None else {key: files.read(row.name, key, self.batches) for key, row in rows.items()}

    def _answers(
        self, row: EvaluationRow, pipeline: Pipeline | None, batch: _Batch | None, number: int
    ) -> list[RowAnswer]:
        """A row's answers to a batch; none where it is not to be asked."""
        if batch is None:
            return []
        return self._ask(row, pipeline, self.batches[number], batch)

    def pipeline(self, row: EvaluationRow) -> Pipeline:
        """The pipeline of a row."""
        assert row.spec is not None
        return Pipeline.from_spec(row.spec, self.model)

    def inputs(self, prompts: Sequence[tuple[Sequence[Image.Image], str]], row: EvaluationRow) -> Any:
        """A batch on the model's device, as a row sees it."""
        return self.on_device(batch_for(self.processor_for(row), prompts))

    def processor_for(self, row: EvaluationRow) -> Any:
        """The processor that a row's images go through."""
        if row.image == "small":
            return self.small_processor
        if row.image == "resized":
            return resizing_processor(self.processor, share_of(row.tokens))
        resized = row.spec is not None and row.spec.resize is not None
        return self.pipeline(row).processor(self.processor) if resized else self.processor

    def on_device(self, batch: Any) -> Any:
        """A batch of the processor on the model's device, in its dtype."""
        return batch.to(self.model.device, dtype=self.model.dtype)

    def _prepare(self, samples: Sequence[LabelledSample], rows: Sequence[EvaluationRow]) -> _Batch:
        """A batch as all rows show it, on the host; runs beside the model."""
        found: dict[_Which, Any] = {}
        for row in rows:
            if _which(row) not in found:
                images = self.shown.images(samples, row.image, row.tokens)
                prompts = [([image], sample.question) for image, sample in zip(images, samples, strict=True)]
                found[_which(row)] = batch_for(self.processor_for(row), prompts)
        return _Batch(self, samples, found)

    def smallest(self) -> float:
        """Largest share of its tokens that an image still has when it is made as small as it can be."""
        some = set(self.sizes[:LOOKED_AT])
        return max(self.small.smallest(size) / self.counter.of_size(size) for size in some)

    def generate(
        self, inputs: Any, samples: Sequence[LabelledSample], pipeline: Pipeline | None, new_tokens: int
    ) -> torch.Tensor:
        """Greedy tokens of a batch, without the prompt."""
        if pipeline is not None:
            show(pipeline, samples)
        return generate(self.model, inputs, pipeline, max_new_tokens=new_tokens)

    def _ask(
        self, row: EvaluationRow, pipeline: Pipeline | None, numbers: Sequence[int], batch: _Batch
    ) -> list[RowAnswer]:
        inputs = batch.inputs(row)
        with self.memory.reused(pipeline):
            out = self.generate(inputs, batch.samples, pipeline, self.task.max_new_tokens)
        texts, new = decode(self.processor, out), [answer_length(self.model, one) for one in out]
        if pipeline is not None:
            report = pipeline.report
            tokens = [sample.visual_tokens for sample in report.samples]
            averages, layers = report.average_kept_by_sample, report.layer_tokens
            text = [rows[0] - sample.visual_by_layer(1)[0] for rows, sample in zip(layers, report.samples, strict=True)]
        else:
            tokens = self.counter.of_batch(inputs)
            averages, lengths = [float(n) for n in tokens], inputs[MASK].sum(1).tolist()
            layers = [[length] * len(self.adapter.layers) for length in lengths]
            text = [length - n for length, n in zip(lengths, tokens, strict=True)]
        flops, decoded = None, 0.0
        if self.shape is not None:
            if pipeline is not None:
                total = of_report(pipeline.report, pipeline.spec, self.shape).compressed.flops.total
            else:
                total = sum(whole_cost(self.shape, n, more, 1) for n, more in zip(tokens, text, strict=True))
            flops = total / len(texts)
            steps = [max(0, length - 1) for length in new]
            decoded = sum(map(functools.partial(decode_flops, self.shape), layers, steps)) / len(texts)
        return [
            RowAnswer(
                question,
                texts[i],
                tokens[i],
                averages[i],
                flops,
                answer_flops=None if flops is None else flops + decoded,
                text_tokens=text[i],
                new_tokens=new[i],
            )
            for i, question in enumerate(numbers)
        ]


class _Batch:
    """One batch of questions, prepared on the host; on the device once a row needs it."""

    def __init__(self, runner: Runner, samples: Sequence[LabelledSample], prepared: dict[_Which, Any]) -> None:
        self.samples = samples
        self._runner, self._prepared = runner, prepared
        self._inputs: dict[_Which, Any] = {}

    def inputs(self, row: EvaluationRow) -> Any:
        which = _which(row)
        if which not in self._inputs:
            self._inputs[which] = self._runner.on_device(self._prepared.pop(which))
        return self._inputs[which]


def _which(row: EvaluationRow) -> _Which:
    return row.image, row.tokens, None if row.spec is None else row.spec.resize


def show(pipeline: Pipeline, samples: Sequence[LabelledSample]) -> None:
    """Tells the oracles of a pipeline what is asked."""
    for stage in pipeline.spec.stages:
        if isinstance(stage.scorer.obj, Oracle):
            stage.scorer.obj.show(samples)


def _shape(model: Any) -> tuple[ModelShape | None, str]:
    """The numbers that FLOPs are counted from, or why they are not known."""
    try:
        return shape_of(model.config), ""
    except TrioError as error:
        return None, f"FLOPs are not counted: {error}"


def _key(row: EvaluationRow) -> str:
    """What the answers of a row depend on, beside the header."""
    spec: Mapping[str, Any] = {} if row.spec is None else row.spec.model_dump(mode="json")
    return json.dumps([spec, row.image, row.tokens], sort_keys=True)
