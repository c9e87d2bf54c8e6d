"""One question at a time, from many callers: what is asked, what is answered, and what is known on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from ..errors import BusyError
from ..measure.answering import decode
from ..pipeline import Pipeline
from ..report.records import SampleReport
from ..spec import PipelineSpec

__all__ = ["PendingRequest", "PromptAnswer", "PromptRequest", "QueueFullError", "StepWatch"]

#: What `decode` gives for bytes that are not a whole character yet.
_UNFINISHED = "\ufffd"


class QueueFullError(BusyError):
    """As many requests wait as may wait; this one was not taken."""


@dataclass(frozen=True)
class PromptRequest:
    """A question about images, with a spec of its own.

    Attributes:
        question: in words, without a chat template.
        images: RGB; none asks the language model alone.
        spec: how the images are compressed; None as the batcher says.
        max_new_tokens: longest answer.
        on_text: told each new piece of the answer, in the batcher's thread; the pieces together are the answer, unless
            the tokenizer changes earlier words by later ones. An error that it raises cancels the request.
    """

    question: str
    images: Sequence[Image.Image] = ()
    spec: PipelineSpec | None = None
    max_new_tokens: int = 64
    on_text: Callable[[str], object] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PromptAnswer:
    """An answer, and what it took.

    Attributes:
        text: without special tokens.
        finish: ``end`` where the model ended it, ``length`` at the longest answer.
        spec: name of the spec.
        new_tokens: of the answer, its end token included.
        visual_tokens: of all images as the processor gave them, resized where the spec does, before any reduction.
        kept: visual tokens averaged over the decoder layers.
        kept_places: for each image the visual tokens that the last layer had, as places among the image's own.
        batch_size: requests that were answered together with it, itself included.
        waited: seconds in the queue.
        seconds: from submission to the end of the answer.
    """

    text: str
    finish: Literal["end", "length"]
    spec: str
    new_tokens: int
    visual_tokens: int
    kept: float
    kept_places: tuple[tuple[int, ...], ...]
    batch_size: int
    waited: float
    seconds: float


@dataclass(frozen=True)
class BoundSpec:
    """A spec on a model.

    Attributes:
        pipeline: of the spec.
        processor: makes its inputs; it resizes images where the spec does.
        key: requests with the same one may stand in one batch.
    """

    pipeline: Pipeline
    processor: Any
    key: str


@dataclass(eq=False)
class PendingRequest:
    """A request that was taken, until its future has a result.

    Attributes:
        request: what was asked.
        bound: its spec.
        future: of the caller, who may cancel it at any time.
        arrived: by `time.monotonic`.
        tokens: of the answer so far.
        finish: why the answer ended; None while it goes on.
        sent: the text that `on_text` was told.
    """

    request: PromptRequest
    bound: BoundSpec
    future: Future[PromptAnswer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    finish: Literal["end", "length"] | None = None
    sent: str = ""

    @property
    def running(self) -> bool:
        """Whether more tokens are wanted."""
        return self.finish is None and not self.future.done()

    def take(self, token: int, ends: Set[int], processor: Any) -> None:
        """One more token of the answer.

        Args:
            token: its id.
            ends: tokens that end an answer.
            processor: makes text of tokens.
        """
        self.tokens.append(token)
        if token in ends:
            self.finish = "end"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish = "length"
        self.send(processor)

    def text(self, processor: Any) -> str:
        """The answer so far; while it goes on, without blanks and broken characters at its end."""
        text = decode(processor, torch.tensor([self.tokens]))[0]
        return text if self.finish else text.rstrip(_UNFINISHED).rstrip()

    def settle(self, outcome: PromptAnswer | BaseException) -> None:
        """Gives the caller the answer or the error; does nothing where the caller has cancelled."""
        try:
            if isinstance(outcome, PromptAnswer):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
        except InvalidStateError:
            pass

    def send(self, processor: Any) -> None:
        """Tells `on_text` what is new."""
        if self.request.on_text is None:
            return
        text = self.text(processor)
        if not text.startswith(self.sent) or text == self.sent:  # asked again alone, or blanks: nothing new yet
            return
        piece, self.sent = text[len(self.sent) :], text
        try:
            self.request.on_text(piece)
        except Exception:  # the caller's own; the rest of the batch goes on
            self.future.cancel()


class StepWatch:
    """A stopping criterion of `generate`: hands each new token to its request, and ends the parts that are over."""

    def __init__(
        self, batch: Sequence[PendingRequest], ends: Set[int], processor: Any, on_end: Callable[[int], None]
    ) -> None:
        """Binds a batch.

        Args:
            batch: in the order of the rows.
            ends: tokens that end an answer.
            processor: makes text of tokens.
            on_end: told the row of each answer that has ended, while the others go on.
        """
        self._batch, self._ends, self._processor, self._on_end = batch, ends, processor, on_end
        for one in batch:
            one.tokens, one.finish = [], None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """After each token: which rows are over, bool ``(B,)``; `input_ids` is int64 ``(B, S)``."""
        for row, (one, token) in enumerate(zip(self._batch, input_ids[:, -1].tolist(), strict=True)):
            if one.running:
                one.take(token, self._ends, self._processor)
                if one.finish is not None:
                    self._on_end(row)
        return torch.tensor([not one.running for one in self._batch], device=input_ids.device)

    def stop(self) -> None:
        """Ends the answers that `generate` ended by a rule of its own, such as the checkpoint's longest sequence."""
        for row, one in enumerate(self._batch):
            if one.running:
                one.finish = "end"
                one.send(self._processor)
                self._on_end(row)


def kept_places(sample: SampleReport) -> tuple[tuple[int, ...], ...]:
    """For each image of a sample the visual tokens that the last layer had, as places among the image's own."""
    if sample.stages:
        return tuple(map(tuple, sample.kept_of_images(len(sample.stages) - 1)))
    if sample.compressor is not None:
        return tuple(tuple(image.indices) for image in sample.compressor.images)
    return tuple(tuple(range(image.tokens)) for image in sample.images)
