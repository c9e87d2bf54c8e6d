"""Answers to rows: a row that cannot be answered gets its reason and stops nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..core.images import batch_for
from ..errors import InputError, TrioError, first_line
from ..measure.answering import answer_length, decode, generate
from ..measure.evaluation.task import normalise
from ..pipeline import Pipeline
from .rows import BatchRow

__all__ = ["OF_A_ROW", "Answerer", "PreparedRows", "RowAnswerer", "RowOutput"]

#: What one row may bring about while it is answered. Other errors, such as those of a device, are not the row's.
OF_A_ROW = (TrioError, ValueError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class RowOutput:
    """What became of a row.

    Attributes:
        id: of the row.
        answer: the text; None where there is an error.
        error: why there is no answer, one line; None where there is one.
        visual_tokens: of the image as the processor gave it, resized where the spec does; 0 with an error.
        kept: visual tokens averaged over the decoder layers; 0 with an error.
        new_tokens: of the answer, its end token included; 0 with an error.
        right: whether the answer is one of those that the row gives; None where it gives none.
    """

    id: str
    answer: str | None
    error: str | None = None
    visual_tokens: int = 0
    kept: float = 0.0
    new_tokens: int = 0
    right: bool | None = None


@dataclass(frozen=True)
class PreparedRows:
    """Rows of one batch as they are asked, on the host.

    Attributes:
        rows: all of them.
        failed: what became of those whose images cannot be read, by place.
        inputs: what is asked for the others; None where there are none, or where it could not be made.
        problem: why it could not be made.
    """

    rows: tuple[BatchRow, ...]
    failed: Mapping[int, RowOutput]
    inputs: Any
    problem: Exception | None = None

    @property
    def asked(self) -> list[BatchRow]:
        """The rows that are asked."""
        return [row for number, row in enumerate(self.rows) if number not in self.failed]


class Answerer(ABC):
    """Answers batches of rows; a row whose image cannot be read gets its reason and is not asked.

    `prepare` needs no model, so that it may run in another thread while `ask` answers an earlier batch.
    """

    #: What one row may bring about while it is answered. Other errors, such as those of a device, are not the row's.
    of_a_row: tuple[type[Exception], ...] = OF_A_ROW

    def answer(self, rows: Sequence[BatchRow]) -> list[RowOutput]:
        """What became of each row, in their order; they are asked as one batch."""
        return self.ask(self.prepare(rows))

    def prepare(self, rows: Sequence[BatchRow]) -> PreparedRows:
        """Reads the images and makes what is asked; what goes wrong is kept for `ask`."""
        failed: dict[int, RowOutput] = {}
        images: dict[int, Image.Image] = {}
        for number, row in enumerate(rows):
            try:
                images[number] = row.load()
            except InputError as error:
                failed[number] = _failed(row, error)
        inputs: Any = None
        if images:
            try:
                inputs = self._inputs([rows[number] for number in images], list(images.values()))
            except Exception as error:  # a processor may raise anything over an odd image
                return PreparedRows(tuple(rows), failed, None, error.with_traceback(None))  # which holds the images
        return PreparedRows(tuple(rows), failed, inputs)

    def ask(self, prepared: PreparedRows) -> list[RowOutput]:
        """What became of each row of a batch, in their order."""
        outputs = iter(self._ask(prepared))
        return [prepared.failed.get(number) or next(outputs) for number in range(len(prepared.rows))]

    @abstractmethod
    def _inputs(self, rows: Sequence[BatchRow], images: Sequence[Image.Image]) -> Any:
        """What is asked for some rows; runs in any thread."""

    @abstractmethod
    def _outputs(self, rows: Sequence[BatchRow], inputs: Any) -> list[RowOutput]:
        """Asks for some rows; an error out of `of_a_row` is taken for one of theirs."""

    def _ask(self, prepared: PreparedRows) -> list[RowOutput]:
        """The outputs of the rows that are asked; where a batch fails, they are asked one by one."""
        rows = prepared.asked
        if not rows:
            return []
        problem = prepared.problem
        if problem is None:
            try:
                return self._outputs(rows, prepared.inputs)
            except self.of_a_row as error:
                problem = error.with_traceback(None)  # which holds the memory of the batch
        if len(rows) == 1:
            return [_failed(rows[0], problem)]
        return [output for row in rows for output in self.answer([row])]


class RowAnswerer(Answerer):
    """A model with its pipeline, which answers batches of rows while the pipeline is attached."""

    def __init__(self, model: Any, processor: Any, pipeline: Pipeline, *, max_new_tokens: int) -> None:
        """Binds a model.

        Args:
            model: in evaluation mode.
            processor: its own.
            pipeline: bound to the model.
            max_new_tokens: longest answer.
        """
        self.model, self.pipeline, self.max_new_tokens = model, pipeline, max_new_tokens
        self.processor = pipeline.processor(processor)

    def ask(self, prepared: PreparedRows) -> list[RowOutput]:
        """See `Answerer.ask`.

        Raises:
            InputError: the pipeline is not attached.
        """
        if not self.pipeline.attached:
            raise InputError("pipeline: it is not attached, so nothing would be compressed; call pipeline.attach().")
        return super().ask(prepared)

    def _inputs(self, rows: Sequence[BatchRow], images: Sequence[Image.Image]) -> Any:
        """As of `Answerer`: the processor's batch, on the host."""
        return batch_for(self.processor, [([image], row.question) for row, image in zip(rows, images, strict=True)])

    def _outputs(self, rows: Sequence[BatchRow], inputs: Any) -> list[RowOutput]:
        """As of `Answerer`."""
        given = inputs.to(self.model.device, dtype=self.model.dtype)
        tokens = generate(self.model, given, max_new_tokens=self.max_new_tokens)
        report = self.pipeline.report
        texts = decode(self.processor, tokens)
        return [
            RowOutput(
                row.id,
                text,
                visual_tokens=sample.visual_tokens,
                kept=average,
                new_tokens=answer_length(self.model, new),
                right=right_of(text, row.answers),
            )
            for row, text, sample, average, new in zip(
                rows, texts, report.samples, report.average_kept_by_sample, tokens, strict=True
            )
        ]


def _failed(row: BatchRow, error: BaseException) -> RowOutput:
    reason = first_line(error) if isinstance(error, TrioError) else f"{type(error).__name__}: {first_line(error)}"
    return RowOutput(row.id, None, reason, right=False if row.answers else None)


def right_of(text: str, answers: Sequence[str]) -> bool | None:
    """Whether an answer is one of those that a row gives; None where it gives none."""
    return normalise(text) in {normalise(one) for one in answers} if answers else None
