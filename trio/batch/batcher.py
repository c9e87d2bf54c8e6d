"""Requests from many threads, answered in batches of one spec each, by one thread that has the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import torch

from ..core.images import batch_for
from ..errors import BusyError, InputError, TrioError, first_line
from ..measure.answering import end_tokens, generate
from ..pipeline import Pipeline
from ..report import CompressionReport
from ..spec import PipelineSpec
from .answerer import OF_A_ROW
from .requests import BoundSpec, PendingRequest, PromptAnswer, PromptRequest, QueueFullError, StepWatch, kept_places
from .stats import BatcherStats

__all__ = ["DynamicBatcher"]

#: Pipelines that are kept for the next request with their spec; the one that was not used for longest goes.
PIPELINES = 32
LOG = logging.getLogger(__name__)


class DynamicBatcher:
    """Answers requests in batches: those with the same spec stand together, and each gets what it gets alone.

    The oldest request comes first, with those of its spec that wait; nobody waits longer than `max_wait` for others
    while the model is free. An answer that has ended is handed over while the rest of its batch goes on. Callers may be
    threads or tasks: `submit` gives a `concurrent.futures.Future` (`asyncio.wrap_future` awaits one), and `cancel` on
    it takes a waiting request out of the queue and ends a running one at its next token.

    Example:
        ```python
        with DynamicBatcher(model, processor, trio.load_spec("trio-soft-11")) as batcher:
            future = batcher.submit(PromptRequest("what is left of the cup ?", [image]))
            print(future.result().text)
        ```
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        spec: PipelineSpec,
        *,
        max_batch: int = 8,
        max_wait: float = 0.01,
        max_queue: int = 64,
    ) -> None:
        """Binds a model and starts the thread.

        Args:
            model: in evaluation mode; other threads may use it too, see `trio.Pipeline.generate`.
            processor: its own.
            spec: of requests that bring none.
            max_batch: most requests in a batch.
            max_wait: seconds that a request waits for others with its spec while the model is free.
            max_queue: most requests that wait.

        Raises:
            TrioError: the spec does not fit the model.
            InputError: a number is out of its range, or the tokenizer cannot pad a batch.
        """
        for name, value, least in (("max_batch", max_batch, 1), ("max_wait", max_wait, 0), ("max_queue", max_queue, 1)):
            if not value >= least:
                raise InputError(f"{name}: found {value!r}; give a number from {least}.")
        self.model, self.processor, self.spec = model, processor, spec
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.broken: str | None = None  # why the last batch failed, where it was no request's fault
        self._ends, self._special = end_tokens(model), _special_words(processor)
        self._bound: OrderedDict[str, BoundSpec] = OrderedDict()
        self._building = threading.Lock()
        self._changed = threading.Condition()
        self._queue: list[PendingRequest] = []
        self._running: Sequence[PendingRequest] = ()
        self._stats = BatcherStats()
        self._closed = False
        self._bind(spec)
        self._thread = threading.Thread(target=self._run, name="trio-batcher", daemon=True)
        self._thread.start()

    # For callers

    def submit(self, request: PromptRequest) -> Future[PromptAnswer]:
        """Queues a request up.

        Returns:
            The answer to come. Its error is a `TrioError` where the request cannot be answered; `cancel` works at any
            time.

        Raises:
            QueueFullError: too many requests wait.
            BusyError: the batcher is closed.
            InputError: the question is empty or has a special token in it, or the longest answer has no token.
            TrioError: the spec does not fit the model.
        """
        try:
            one = PendingRequest(request, self.check(request))
            with self._changed:
                self._check_room()
                self._queue.append(one)
                self._changed.notify_all()
        except TrioError:
            with self._changed:
                self._stats.outcomes["refused"] += 1
            raise
        one.future.add_done_callback(self._done)
        return one.future

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, and ends the thread.

        Args:
            seconds: for those that wait or run, at most; what is left then gets a `BusyError`.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            left = [*self._queue, *self._running]
        for one in left:
            one.settle(BusyError("request: the service is shutting down; send it again, to another one."))
        self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether it takes requests, and the model answered the last batch."""
        return self._thread.is_alive() and not self._closed and self.broken is None

    @property
    def stats(self) -> BatcherStats:
        """What it has done so far, as a copy."""
        with self._changed:
            running = sum(not one.future.done() for one in self._running)
            return self._stats.now(waiting=len(self._queue), running=running)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; what was asked is answered, unless there was an error."""
        self.close(0.0 if kind else threading.TIMEOUT_MAX)

    # Before the queue

    def check(self, request: PromptRequest) -> BoundSpec:
        """What `submit` would refuse is refused; a pipeline that has to be built is kept, so that `submit` is quick.

        Returns:
            The request's spec on the model.

        Raises:
            TrioError: as `submit`.
        """
        if not request.question.strip():
            raise InputError("request.question: it is empty; ask something.")
        if request.max_new_tokens < 1:
            raise InputError(f"request.max_new_tokens: found {request.max_new_tokens}; give a number from 1.")
        word = next((word for word in self._special if word in request.question), None)
        if word is not None:
            raise InputError(
                f"request.question: found {word!r}, which the model reads as a token with a meaning of its own; leave "
                "it out, images stand in front of the question by themselves."
            )
        with self._changed:
            self._check_room()  # before a pipeline is made for nothing
        return self._bind(self.spec if request.spec is None else request.spec)

    def _check_room(self) -> None:
        if self._closed:
            raise BusyError("request: the service is shutting down; send it again, to another one.")
        if len(self._queue) >= self.max_queue:
            raise QueueFullError(f"request: {self.max_queue} requests wait, and no more may; send it again later.")

    def _bind(self, spec: PipelineSpec) -> BoundSpec:
        key = spec.model_dump_json()
        with self._building:
            if key not in self._bound:
                pipeline = Pipeline.from_spec(spec, self.model)
                self._bound[key] = BoundSpec(pipeline, pipeline.processor(self.processor), key)
            self._bound.move_to_end(key)
            while len(self._bound) > PIPELINES:
                self._bound.popitem(last=False)
            return self._bound[key]

    # In the thread

    def _run(self) -> None:
        while batch := self._next():
            begin = time.monotonic()
            try:
                self._answer(batch)
                self.broken = None
            except Exception as error:  # of the device or of the code: the next batch may go well
                LOG.exception("a batch of %d failed", len(batch))
                self.broken = f"{type(error).__name__}: {first_line(error)}"
                for one in batch:
                    one.settle(error)
            with self._changed:
                self._running = ()
                self._stats.model_seconds += time.monotonic() - begin

    def _next(self) -> list[PendingRequest]:
        """The next batch, once there is one; empty where the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                batch, wait = self._ready()
                if batch or (self._closed and not self._queue):
                    break
                self._changed.wait(wait)
            self._queue = [one for one in self._queue if one not in batch]
            self._running = batch
            if batch:
                self._stats.batches[len(batch)] += 1
            return batch

    def _ready(self) -> tuple[list[PendingRequest], float | None]:
        """The oldest request's batch where it has waited long enough, else a full one, else seconds until then."""
        if not self._queue:
            return [], None
        groups: dict[str, list[PendingRequest]] = {}
        for one in self._queue:
            groups.setdefault(one.bound.key, []).append(one)
        oldest = self._queue[0]
        left = oldest.arrived + self.max_wait - time.monotonic()
        if left <= 0 or self._closed:
            return groups[oldest.bound.key][: self.max_batch], None
        full = next((group for group in groups.values() if len(group) >= self.max_batch), [])
        return full[: self.max_batch], left

    def _answer(self, batch: Sequence[PendingRequest]) -> None:
        """Answers requests of one spec; where that fails for the sake of some, each by itself."""
        try:
            self._ask(batch)
            return
        except _OfRequest as failure:
            if len(batch) == 1:
                batch[0].settle(failure.error)
                return
        for one in batch:  # the failed batch holds no memory any more
            if not one.future.done():
                self._answer([one])

    def _ask(self, batch: Sequence[PendingRequest]) -> None:
        begin, bound = time.monotonic(), batch[0].bound
        try:
            inputs = batch_for(bound.processor, [(one.request.images, one.request.question) for one in batch])
            inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        except Exception as error:  # a processor may raise anything over an odd image
            raise _OfRequest(error) from error
        has_images = any(one.request.images for one in batch)
        report: CompressionReport | None = None

        def ended(row: int) -> None:
            nonlocal report
            if report is None and has_images:
                report = bound.pipeline.report
            batch[row].settle(self._made(batch[row], report, row, len(batch), begin))

        watch = StepWatch(batch, self._ends, self.processor, ended)
        longest = max(one.request.max_new_tokens for one in batch)
        try:
            with bound.pipeline.in_this_thread():
                generate(self.model, inputs, max_new_tokens=longest, stopping_criteria=[watch])
        except OF_A_ROW as error:
            raise _OfRequest(error) from error
        watch.stop()

    def _made(
        self, one: PendingRequest, report: CompressionReport | None, row: int, size: int, begin: float
    ) -> PromptAnswer:
        assert one.finish is not None
        sample = None if report is None else report.samples[row]
        return PromptAnswer(
            text=one.text(self.processor),
            finish=one.finish,
            spec=one.bound.pipeline.spec.name,
            new_tokens=len(one.tokens),
            visual_tokens=0 if sample is None else sample.visual_tokens,
            kept=0.0 if report is None else report.average_kept_by_sample[row],
            kept_places=() if sample is None else kept_places(sample),
            batch_size=size,
            waited=begin - one.arrived,
            seconds=time.monotonic() - one.arrived,
        )

    def _done(self, future: Future[PromptAnswer]) -> None:
        """Counts a request whose future is done, in whatever thread that is."""
        with self._changed:
            self._queue = [one for one in self._queue if one.future is not future]  # it may hold large images
            if future.cancelled():
                future.set_running_or_notify_cancel()  # `concurrent.futures.wait` waits for that
                self._stats.outcomes["cancelled"] += 1
            elif future.exception() is not None:
                self._stats.outcomes["failed"] += 1
            else:
                self._stats.add(future.result())


class _OfRequest(Exception):
    """A batch failed by what a request in it may bring about; `error` is what that request's caller is told."""

    def __init__(self, cause: Exception) -> None:
        self.error: TrioError
        if isinstance(cause, TrioError):
            self.error = cause
        elif isinstance(cause, torch.OutOfMemoryError):
            self.error = BusyError(
                "request: the device has not the memory for it, not even alone; send fewer or smaller images, or "
                "another spec."
            )
        else:
            self.error = InputError(
                f"request: the model or its processor does not take it ({type(cause).__name__}: {first_line(cause)}); "
                "check its images and its question."
            )


def _special_words(processor: Any) -> list[str]:
    """Texts that the tokenizer reads as tokens with a meaning of their own."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = {str(token.content) for token in added if token.special}
    return sorted({*words, getattr(processor, "image_token", None) or ""} - {""})
