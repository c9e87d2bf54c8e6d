"""The ways of running a model that are compared: whole, with a spec, with an oracle, and the cheap alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ...adapters.base import Adapter
from ...cost import ModelShape, of_report, predict
from ...cost.prediction import Cost
from ...errors import TrioError
from ...pipeline import Pipeline
from ...report import CompressionReport
from ...spec import PipelineSpec
from ..equal_cost import nearest_size, pool_count, pooled_cost, pooled_spec
from .architectures import Size
from .prompts import Prompts
from .report import Kind
from .timing import TimedWay, run

__all__ = ["Entry", "Maker"]

#: How near the cost of a smaller image has to come to that of a spec to be called equal.
NEAR = 0.10
_KEEP_ALL: Mapping[str, Any] = {
    "version": 1,
    "name": "keep-all",
    "stages": [{"after_layer": 0, "keep": "100%"}],
}
#: A stage whose tokens are given: its parts are named and never run.
_GIVEN: Mapping[str, Any] = {"after_layer": 0, "keep": 1, "scorer": "random", "selector": "top-k"}


@dataclass(frozen=True)
class Entry:
    """A way with what is known about it before it is timed.

    Attributes:
        way: what is run.
        kind: what it is.
        spec: name of the spec that it belongs to.
        visual: visual tokens of a sample, entering.
        kept: averaged over the layers.
        flops: counted, of the whole batch's prefill.
        overhead: of these the scoring, selecting and compressing.
        pipeline: with the report level ``full``, for the phases; None where nothing is attached.
        notes: for readers.
    """

    way: TimedWay
    kind: Kind
    spec: str | None
    visual: float
    kept: float
    flops: int | None = None
    overhead: int | None = None
    pipeline: Pipeline | None = None
    notes: Sequence[str] = field(default_factory=tuple)


class Maker:
    """Makes the ways for one model and one batch."""

    def __init__(
        self,
        adapter: Adapter,
        prompts: Prompts,
        *,
        samples: int,
        steps: int,
        shape: ModelShape | None,
        size: Size | None = None,
    ) -> None:
        """Binds the maker.

        Args:
            adapter: of the model.
            prompts: makes the batches.
            samples: of a batch.
            steps: decode steps behind each prefill.
            shape: of the model; None where its cost is not known.
            size: of the images; None: the first of the prompts' sizes.
        """
        self.adapter, self.prompts, self.samples, self.steps, self.shape = adapter, prompts, samples, steps, shape
        self.inputs = self._on_device(prompts.batch(samples, size))
        self.visual = prompts.visual(size or prompts.sizes[0])
        self.text = int(self.inputs["input_ids"].shape[1]) - self.visual

    def full(self) -> Entry:
        """The model as it is."""
        way = TimedWay("full model", self.inputs, nullcontext, self.steps)
        return Entry(way, "full", None, self.visual, self.visual, self._full_flops(self.visual))

    def keep_all(self) -> Entry:
        """A pipeline that drops nothing."""
        pipeline = Pipeline.from_spec(_KEEP_ALL, self._model, adapter=self.adapter)
        way = TimedWay("all tokens kept", self.inputs, lambda: pipeline, self.steps)
        return Entry(way, "keep-all", None, self.visual, self.visual, self._full_flops(self.visual), 0)

    def of_spec(self, spec: PipelineSpec) -> list[Entry]:
        """A spec, its oracle, the cheap alternative at equal cost, and the untouched model with as short a cache."""
        pipeline = Pipeline.from_spec(spec, self._model, adapter=self.adapter)
        full_report = Pipeline.from_spec(spec, self._model, adapter=self.adapter, report="full")
        inputs, visual = self.inputs_of(spec)
        with pipeline:
            run(self._model, inputs, 0)
        report = pipeline.report
        cost, why = self._cost(report, spec)
        overhead = None if cost is None else cost.flops.scoring + cost.flops.selection + cost.flops.compression
        flops = None if cost is None else cost.flops.total
        kept = report.average_kept / self.samples
        way = TimedWay(spec.name, inputs, lambda: pipeline, self.steps)
        notes = [*report.notes, *why]
        made = [Entry(way, "spec", spec.name, visual, kept, flops, overhead, full_report, notes)]
        if spec.stages or spec.compressor is not None:
            oracle = self._oracle(spec, report, None if flops is None else flops - (overhead or 0), inputs)
            made.append(oracle)
        if flops is not None:
            made += self._alternative(spec, flops)
        if self.steps:
            made.append(self._short(spec, report))
        return made

    def inputs_of(self, spec: PipelineSpec) -> tuple[Mapping[str, Any], int]:
        """The batch for a spec, its images resized where it says so, and the visual tokens of a sample."""
        if spec.resize is None:
            return self.inputs, self.visual
        inputs, visual = self.prompts.resized(self.samples, spec.resized)
        return self._on_device(inputs), visual

    def _oracle(
        self, spec: PipelineSpec, report: CompressionReport, flops: int | None, inputs: Mapping[str, Any]
    ) -> Entry:
        """The same tokens, given: nothing is scored, selected, compared or merged."""
        stages: list[Mapping[str, Any]] = [
            {**_GIVEN, "after_layer": stage.after_layer} for stage in report.samples[0].stages
        ]
        selection = report.selection()
        if spec.compressor is not None:
            first = [
                [list(image.indices) for image in sample.compressor.images] if sample.compressor else []
                for sample in report.samples
            ]
            if not stages or stages[0]["after_layer"]:
                stages, selection = [_GIVEN, *stages], [first, *selection]
        given = Pipeline(
            self._model,
            stages=stages,
            positions=report.positions,
            newlines=spec.newlines,
            name=f"oracle of {spec.name}",
            adapter=self.adapter,
        )
        way = TimedWay(f"oracle of {spec.name}", inputs, lambda: given.replay(selection), self.steps)
        kept = report.average_kept / self.samples
        return Entry(way, "oracle", spec.name, report.visual_tokens / self.samples, kept, flops, 0)

    def _alternative(self, spec: PipelineSpec, flops: int) -> list[Entry]:
        """A smaller image that costs as much; where images have one size, or none comes near, average pooling."""
        assert self.shape is not None
        by_size = {size: self.prompts.visual(size) for size in self.prompts.sizes}
        costs = {size: self._full_flops(visual) for size, visual in by_size.items()}
        size = nearest_size(list(costs), lambda one: costs[one] or 0, flops)
        if abs((costs[size] or 0) / flops - 1) <= NEAR:
            inputs, visual = self._on_device(self.prompts.batch(self.samples, size)), by_size[size]
            way = TimedWay(f"resize for {spec.name}", inputs, nullcontext, self.steps)
            return [
                Entry(way, "resize", spec.name, visual, visual, costs[size], 0, notes=[f"image of {size[0]}x{size[1]}"])
            ]
        if len(set(by_size.values())) == 1:
            why = "resizing does not apply: images have one number of tokens"
        else:
            why = "resizing does not apply: no size of image costs as little"
        return self._pool(spec, flops, why)

    def _pool(self, spec: PipelineSpec, flops: int, why: str) -> list[Entry]:
        """Average pooling on the encoder side to the count at which the whole costs as much."""
        assert self.shape is not None
        shape = self.shape

        def cost(count: int) -> int:
            return pooled_cost(shape, count, self.visual, self.text, 0) * self.samples

        count = pool_count(cost, self.visual, flops)
        if count is None:
            return []
        try:
            pipeline = Pipeline.from_spec(pooled_spec(count, name=f"pool-{count}"), self._model, adapter=self.adapter)
            with pipeline:
                run(self._model, self.inputs, 0)
        except TrioError:
            return []
        way = TimedWay(f"average pool for {spec.name}", self.inputs, lambda: pipeline, self.steps)
        return [Entry(way, "pool", spec.name, self.visual, count, cost(count), None, notes=[why])]

    def _short(self, spec: PipelineSpec, report: CompressionReport) -> Entry:
        """The untouched model on text alone, as long as the compressed cache is on average over the layers."""
        rows = [tokens for sample in report.layer_tokens for tokens in sample]
        length = max(1, round(sum(rows) / len(rows)))
        inputs = self._on_device(self.prompts.text(self.samples, length))
        way = TimedWay(f"short cache of {spec.name}", inputs, nullcontext, self.steps)
        return Entry(way, "short", spec.name, 0, 0, notes=[f"text of {length} tokens"])

    def _cost(self, report: CompressionReport, spec: PipelineSpec) -> tuple[Cost | None, list[str]]:
        if self.shape is None:
            return None, ["FLOPs are not known: no adapter describes this model's cost"]
        try:
            made = of_report(report, spec, self.shape)
        except TrioError as error:
            return None, [f"FLOPs are not known: {error}"]
        return made.compressed, list(made.notes)

    def _full_flops(self, visual: int) -> int | None:
        """The prefill of the whole batch on the model as it is."""
        if self.shape is None:
            return None
        made = predict(_KEEP_ALL, self.shape, images=(visual,), text_tokens=self.text)
        return made.full.flops.total * self.samples

    @property
    def _model(self) -> Any:
        return self.adapter.model

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value.to(device)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in inputs.items()
        }
