"""Answers to rows: a row that cannot be answered gets its reason and stops nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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

__all__ = ["OF_A_ROW", "Answerer", "RowAnswerer", "RowOutput"]

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


class Answerer(ABC):
    """Answers batches of rows; a row whose image cannot be read gets its reason and is not asked."""

    def answer(self, rows: Sequence[BatchRow]) -> list[RowOutput]:
        """What became of each row, in their order; they are asked as one batch."""
        results: dict[int, RowOutput] = {}
        images: dict[int, Image.Image] = {}
        for number, row in enumerate(rows):
            try:
                images[number] = row.load()
            except InputError as error:
                results[number] = _failed(row, error)
        asked = [rows[number] for number in images]
        results |= dict(zip(images, self._ask(asked, list(images.values())), strict=True))
        return [results[number] for number in range(len(rows))]

    @abstractmethod
    def _ask(self, rows: Sequence[BatchRow], images: Sequence[Image.Image]) -> list[RowOutput]:
        """As `answer`, with the images loaded; where a batch fails, its rows are asked one by one."""

    def _one_by_one(
        self, rows: Sequence[BatchRow], images: Sequence[Image.Image], error: BaseException
    ) -> list[RowOutput]:
        """Asks each row alone, or says why the only one has no answer."""
        if len(rows) == 1:
            return [_failed(rows[0], error)]
        return [self._ask([row], [image])[0] for row, image in zip(rows, images, strict=True)]


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

    def answer(self, rows: Sequence[BatchRow]) -> list[RowOutput]:
        """See `Answerer.answer`.

        Raises:
            InputError: the pipeline is not attached.
        """
        if not self.pipeline.attached:
            raise InputError("pipeline: it is not attached, so nothing would be compressed; call pipeline.attach().")
        return super().answer(rows)

    def _ask(self, rows: Sequence[BatchRow], images: Sequence[Image.Image]) -> list[RowOutput]:
        """As of `Answerer`."""
        if not rows:
            return []
        try:
            prompts = [([image], row.question) for row, image in zip(rows, images, strict=True)]
            inputs = batch_for(self.processor, prompts).to(self.model.device, dtype=self.model.dtype)
        except Exception as error:  # a processor may raise anything over an odd image
            return self._one_by_one(rows, images, error)
        try:
            tokens = generate(self.model, inputs, max_new_tokens=self.max_new_tokens)
        except OF_A_ROW as error:
            return self._one_by_one(rows, images, error)
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
