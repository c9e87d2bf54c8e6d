"""Asks the model what a trial's spec leaves of its answers, against answers of the full model kept in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median
from typing import Any

import torch

from ...core.context import LayerContext
from ...core.images import batch_for
from ...cost import ModelShape, shape_of
from ...errors import UnsupportedModelError
from ...pipeline import Pipeline
from ...scorers.base import Scorer
from ...spec import PipelineSpec, load_spec
from ..ahead import prepared
from ..answering import BatchAnswers, GreedyAnswerer
from ..encoding import LIMIT, EncodedImages
from ..fidelity.compare import Likeness, compare
from ..fidelity.samples import PromptSample
from ..fidelity.ways import Tokens

#: Turns of the full and the compressed model where times are asked for; the median of their ratios counts.
TURNS = 3


@dataclass(frozen=True)
class Found:
    """What a spec was found to do.

    Attributes:
        values: by metric, see `trio.measure.tuning.target`.
        errors: standard errors of the qualities, prompts of one image together.
        kl: mean KL of the first token, nats.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float]
    kl: float


class Judge:
    """Knows the full model's answers to the samples of the search."""

    def __init__(
        self,
        answerer: GreedyAnswerer,
        samples: Sequence[PromptSample],
        *,
        batch_size: int,
        timed: bool,
        encoded_bytes: int = LIMIT,
    ) -> None:
        """Asks the full model once.

        Args:
            answerer: asks; its longest answer is compared.
            samples: of the search.
            batch_size: samples in a batch.
            timed: whether `Found.values` has a speed.
            encoded_bytes: features of images that are kept for the next spec, on the model's device; the others are
                encoded again for each.
        """
        self._answerer = answerer
        self._timed = timed
        self._images = [sample.name for sample in samples]
        self.unknown = ""
        try:
            self._shape: ModelShape | None = shape_of(answerer.adapter.model.config)
        except UnsupportedModelError as error:
            self._shape, self.unknown = None, str(error)
        batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self._batches = batches
        self._memory = EncodedImages(answerer.adapter, limit=encoded_bytes)
        self._inputs: list[Any] = []
        self._resized: dict[int | str, list[Any]] = {}
        self._full: list[BatchAnswers] = []
        for batch in prepared(lambda some: answerer.prepare([one.question() for one in some]), batches):
            self._inputs.append(answerer.on_device(batch))
            self._full.append(answerer(self._inputs[-1], memory=self._memory))

    @property
    def tokens(self) -> int:
        """Visual tokens of the first image, found with a spec that keeps them all."""
        spec = load_spec({"version": 1, "stages": [{"after_layer": 0, "keep": "100%", "scorer": _Unscored()}]})
        pipeline = Pipeline.from_spec(spec, self._answerer.adapter.model, adapter=self._answerer.adapter)
        report = self._answerer(self._inputs[0], pipeline, max_new_tokens=1, memory=self._memory).report
        assert report is not None  # a pipeline was given
        return report.samples[0].visual_tokens

    def judge(self, spec: PipelineSpec) -> Found:
        """What a spec does to the samples.

        ``flops`` is the share of visual tokens where the model's cost is not known (`unknown` says why).

        Raises:
            TrioError: it does not fit the model.
        """
        pipeline = Pipeline.from_spec(spec, self._answerer.adapter.model, adapter=self._answerer.adapter)
        tokens, likenesses = Tokens(), list[Likeness]()
        for inputs, whole, full in zip(self._seen(pipeline), self._inputs, self._full, strict=True):
            other = self._answerer(inputs, pipeline, memory=self._memory)
            assert other.report is not None  # a pipeline was given
            before = None if spec.resize is None else self._answerer.adapter.image_counts(whole)
            tokens.add(other.report, spec, self._shape, before)
            likenesses += compare(full.logits, other.logits, full.texts, other.texts)
        share = tokens.kept / tokens.visual if tokens.visual else 1.0
        qualities = {
            "agreement": [float(one.top1) for one in likenesses],
            "answers": [float(one.exact) for one in likenesses],
            "similarity": [one.edit for one in likenesses],
        }
        values = {metric: fmean(each) for metric, each in qualities.items()}
        errors = {metric: standard_error(each, self._images) for metric, each in qualities.items()}
        values |= {"tokens": share, "flops": share if tokens.flops_share is None else tokens.flops_share}
        if self._timed:
            values["speed"] = self._speed(pipeline)
        return Found(values, errors, fmean(one.kl for one in likenesses))

    def _seen(self, pipeline: Pipeline) -> list[Any]:
        """The batches as a spec sees them: of each size of images made once."""
        resize = pipeline.spec.resize
        if resize is None:
            return self._inputs
        if resize not in self._resized:
            processor = pipeline.processor(self._answerer.processor)
            self._resized[resize] = [
                self._answerer.on_device(batch_for(processor, [one.question() for one in batch]))
                for batch in self._batches
            ]
        return self._resized[resize]

    def _speed(self, pipeline: Pipeline) -> float:
        whole, inputs = self._inputs[0], self._seen(pipeline)[0]
        ratios = []
        for _ in range(TURNS):
            full = self._answerer(whole, max_new_tokens=1).first_token
            ratios.append(full / self._answerer(inputs, pipeline, max_new_tokens=1).first_token)
        return median(ratios)


class _Unscored(Scorer):
    """Of a stage that keeps everything, which asks no scorer; fits every model."""

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """The same number for all tokens."""
        return ctx.at_visual(torch.zeros_like(ctx.visual, dtype=torch.float32))


def standard_error(values: Sequence[float], images: Sequence[str]) -> float:
    """Of a mean whose values come in clusters, one an image (linearised ratio; 0 where all values are alike)."""
    mean, away = fmean(values), dict.fromkeys(images, 0.0)
    for value, image in zip(values, images, strict=True):
        away[image] += value - mean
    groups = len(away)
    if groups < 2:
        return 0.0
    return sqrt(groups / (groups - 1) * sum(one**2 for one in away.values())) / len(values)
