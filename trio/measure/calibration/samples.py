"""Asks the full model and pipelines the same prompts, and holds each against the full model's own answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ...adapters.base import Adapter
from ...cost import ModelShape, shape_of
from ...errors import InputError, UnsupportedModelError
from ...pipeline import Pipeline
from ...spec import PipelineSpec
from ..ahead import AHEAD, prepared
from ..answering import GreedyAnswerer
from ..encoding import LIMIT, EncodedImages
from ..fidelity import PromptSample
from ..fidelity.ways import Tokens
from ..statistics import Bootstrap, Estimate
from ..teacher import greedy_answer, teacher_forced

__all__ = ["CalibrationSet", "Contender"]


@dataclass
class Contender:
    """A spec, or draws of a random one that batches take in turn, and what was found of it.

    Attributes:
        spec: the first of the specs.
        pipelines: one for each.
        tokens: kept, and FLOPs.
        kl: of each sample, the mean over the positions of the answer, nats.
        top1: of each sample, the share of these positions that agree.
    """

    spec: PipelineSpec
    pipelines: list[Pipeline]
    tokens: Tokens = field(default_factory=Tokens)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, specs: Sequence[PipelineSpec], adapter: Adapter) -> Contender:
        """Builds the pipelines.

        Raises:
            TrioError: a spec does not fit the model.
        """
        return cls(specs[0], [Pipeline.from_spec(spec, adapter.model, adapter=adapter) for spec in specs])


class CalibrationSet:
    """Samples, and a model that is asked about them.

    Attributes:
        adapter: of the model.
        samples: what is asked.
        images: how many.
        positions: tokens of the full model's answers, in all; 0 before anything was asked.
        unknown: why FLOPs are not known; empty where they are.
    """

    def __init__(
        self,
        answerer: GreedyAnswerer,
        samples: Sequence[PromptSample],
        *,
        batch_size: int,
        encoded_bytes: int = LIMIT,
    ) -> None:
        """Binds a model and samples.

        Args:
            answerer: its longest answer is that of the full model.
            samples: at least one.
            batch_size: samples in a batch.
            encoded_bytes: features of a batch's images that are kept for the next contender, on the model's device.

        Raises:
            InputError: there is no sample, or a number is not positive.
        """
        if not samples:
            raise InputError("samples: there is none; give at least one.")
        for label, number in (("batch_size", batch_size), ("max_new_tokens", answerer.max_new_tokens)):
            if number < 1:
                raise InputError(f"{label}: found {number}; give 1 or more.")
        self.samples, self.positions, self.unknown = list(samples), 0, ""
        self.adapter = answerer.adapter
        self._answerer, self._batch_size = answerer, batch_size
        self._memory = EncodedImages(answerer.adapter, limit=encoded_bytes)
        names = [sample.name for sample in samples]
        scenes = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self.images = len(scenes)
        self._draws = Bootstrap([scenes[name] for name in names])
        self._shape: ModelShape | None = None
        try:
            self._shape = shape_of(answerer.adapter.model.config)
        except UnsupportedModelError as error:
            self.unknown = str(error)

    def ask(self, contenders: Sequence[Contender], progress: Callable[[int, int], None] | None = None) -> None:
        """Fills the contenders: batch by batch, the full model answers, and each is held against what it said.

        Args:
            contenders: not asked before.
            progress: told (batches done, batches in all) before the first batch and after each.
        """
        answerer, size = self._answerer, self._batch_size
        batches = [self.samples[start : start + size] for start in range(0, len(self.samples), size)]
        coming = prepared(lambda batch: answerer.prepare([one.question() for one in batch]), batches, ahead=AHEAD)
        self.positions = 0
        for index, batch in enumerate(coming):
            if progress is not None:
                progress(index, len(batches))
            self._batch(answerer.on_device(batch), contenders, index)
        if progress is not None:
            progress(len(batches), len(batches))

    def _batch(self, inputs: Any, contenders: Sequence[Contender], index: int) -> None:
        model, memory = self._answerer.model, self._memory
        memory.clear()
        with memory.reused(None):
            full = greedy_answer(model, inputs, max_new_tokens=self._answerer.max_new_tokens)
        self.positions += sum(full.lengths)
        for contender in contenders:
            pipeline = contender.pipelines[index % len(contender.pipelines)]
            with memory.reused(pipeline):
                found = teacher_forced(model, inputs, full, pipeline)
            contender.tokens.add(pipeline.report, contender.spec, self._shape)
            contender.kl += [fmean(one.kl) for one in found]
            contender.top1 += [fmean(one.top1) for one in found]

    def mean(self, values: Sequence[float], other: Sequence[float] | None = None) -> Estimate:
        """The mean of numbers of the samples, less those of another contender, with its interval over images."""
        if other is None:
            return self._draws.number(values)
        return self._draws.number([one - two for one, two in zip(values, other, strict=True)])

    def share(self, values: Sequence[float]) -> Estimate:
        """The mean of shares of the samples, with its interval over images."""
        return self._draws.mean(values)
