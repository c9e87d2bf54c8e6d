"""Asks a model all questions in all rows, batch by batch, and goes on where it was stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...adapters import adapter_for
from ...core.images import batch_for
from ...core.upstream import MASK
from ...cost import ModelShape, of_report, shape_of
from ...cost.flops import prefill_flops, projector_flops, tower_flops
from ...errors import TrioError
from ...pipeline import Pipeline
from ..answering import decode, generate
from .answers import AnswerFiles, RowAnswer
from .floors import Oracle
from .images import Counter, Shown, without_floor
from .rows import EvaluationRow, ImageChoice
from .task import LabelledSample, Task

__all__ = ["Runner"]

#: Images that are looked at for what holds for all of them.
LOOKED_AT = 16
Progress = Callable[[int, int], None]


class Runner:
    """A model, a task, and how they are brought together."""

    def __init__(self, model: Any, processor: Any, task: Task, batch_size: int) -> None:
        """Lays out the batches: images of one size together, so that little is padded.

        Args:
            model: the model.
            processor: its processor.
            task: the questions.
            batch_size: questions in a batch.
        """
        self.model, self.processor, self.task = model, processor, task
        self.adapter = adapter_for(model)
        self.small_processor = without_floor(processor)
        self.counter, self.small = (Counter(self.adapter, one) for one in (processor, self.small_processor))
        self.shown = Shown(task, self.counter, self.small)
        self.shape, self.no_flops = _shape(model)
        sizes = {sample.scene: sample.load().size for sample in task.samples}
        order = sorted(range(len(task.samples)), key=lambda i: (sizes[task.samples[i].scene], i))
        self.batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        self.sizes = list(sizes.values())

    def run(
        self, rows: Sequence[EvaluationRow], files: AnswerFiles, progress: Progress | None = None
    ) -> dict[str, list[RowAnswer]]:
        """All answers of all rows, in the order of the questions.

        Args:
            rows: rows that are not refused.
            files: where answers are, and are written.
            progress: told the finished and all batches.
        """
        answers_by_key: dict[str, list[RowAnswer]] = {}
        done: dict[str, int] = {}
        first: dict[str, EvaluationRow] = {}  # rows that do the same are asked once
        for row in rows:
            first.setdefault(_key(row), row)
        for key, row in first.items():
            answers_by_key[key], done[key] = files.read(row.name, key, self.batches)
        finished, total = sum(done.values()), len(first) * len(self.batches)
        pipelines = {key: self.pipeline(row) for key, row in first.items() if row.spec is not None}
        for number, batch in enumerate(self.batches):
            if progress is not None:
                progress(finished, total)
            inputs = _Inputs(self, [self.task.samples[i] for i in batch])
            for key, row in first.items():
                if done[key] > number:
                    continue
                texts, tokens, averages, flops = self._ask(row, pipelines.get(key), inputs)
                answers = [
                    RowAnswer(question, text, n, average, flops)
                    for question, text, n, average in zip(batch, texts, tokens, averages, strict=True)
                ]
                files.add(row.name, key, answers)
                answers_by_key[key] += answers
                finished += 1
                if progress is not None:
                    progress(finished, total)
        return {row.name: sorted(answers_by_key[_key(row)], key=lambda answer: answer.question) for row in rows}

    def pipeline(self, row: EvaluationRow) -> Pipeline:
        """The pipeline of a row."""
        assert row.spec is not None
        return Pipeline.from_spec(row.spec, self.model)

    def inputs(self, prompts: Sequence[tuple[Sequence[Image.Image], str]], which: ImageChoice) -> Any:
        """A batch on the model's device."""
        made = batch_for(self.small_processor if which == "small" else self.processor, prompts)
        return made.to(self.model.device, dtype=self.model.dtype)

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
        self, row: EvaluationRow, pipeline: Pipeline | None, batch: _Inputs
    ) -> tuple[list[str], list[int], list[float], float | None]:
        inputs = batch.inputs(row)
        tower = None if pipeline is not None and pipeline.reads_tower else self.adapter.vision_tower
        with remembered(tower, batch.seen(row)) if tower is not None else nullcontext():
            out = self.generate(inputs, batch.samples, pipeline, self.task.max_new_tokens)
        texts = decode(self.processor, out)
        if pipeline is not None:
            report = pipeline.report
            tokens = [sample.visual_tokens for sample in report.samples]
            flops = None
            if self.shape is not None:
                flops = of_report(report, pipeline.spec, self.shape).compressed.flops.total / len(texts)
            return texts, tokens, report.average_kept_by_sample, flops
        tokens = self.counter.of_batch(inputs)
        return texts, tokens, [float(n) for n in tokens], self._stock_flops(inputs, tokens)

    def _stock_flops(self, inputs: Any, tokens: Sequence[int]) -> float | None:
        """Mean FLOPs of the model as it is: vision tower, projector and prefill."""
        shape = self.shape
        if shape is None:
            return None
        lengths = inputs[MASK].sum(1).tolist()
        each = [
            tower_flops(shape.tower, n) + projector_flops(shape, n) + prefill_flops(shape, [length] * shape.layers)
            for n, length in zip(tokens, lengths, strict=True)
        ]
        return sum(each) / len(each)


class _Inputs:
    """One batch, made ready when a row needs it."""

    def __init__(self, runner: Runner, samples: Sequence[LabelledSample]) -> None:
        self.samples = samples
        self._runner = runner
        self._inputs: dict[tuple[str, float], Any] = {}
        self._seen: dict[tuple[str, float], list[Any]] = {}

    def inputs(self, row: EvaluationRow) -> Any:
        which = (row.image, row.tokens)
        if which not in self._inputs:
            runner = self._runner
            images = runner.shown.images(self.samples, row.image, row.tokens)
            prompts = [([image], s.question) for image, s in zip(images, self.samples, strict=True)]
            self._inputs[which] = runner.inputs(prompts, row.image)
        return self._inputs[which]

    def seen(self, row: EvaluationRow) -> list[Any]:
        """What the vision tower gave for these images, call by call; empty at first."""
        return self._seen.setdefault((row.image, row.tokens), [])


def show(pipeline: Pipeline, samples: Sequence[LabelledSample]) -> None:
    """Tells the oracles of a pipeline what is asked."""
    for stage in pipeline.spec.stages:
        if isinstance(stage.scorer.obj, Oracle):
            stage.scorer.obj.show(samples)


@contextmanager
def remembered(tower: nn.Module, seen: list[Any]) -> Iterator[None]:
    """For the block, the vision tower gives again what it gave for the same batch: rows would make it look anew.

    Args:
        tower: the vision tower.
        seen: what it gave, call by call; empty at first, and filled then.
    """
    look, own = tower.forward, vars(tower).get("forward")
    calls = iter(range(len(seen)))

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(calls, None)
        if call is None:
            seen.append(look(*args, **kwargs))
            call = -1
        return copy.copy(seen[call])

    tower.forward = forward
    try:
        yield
    finally:
        if own is None:
            del tower.forward
        else:
            tower.forward = own


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
