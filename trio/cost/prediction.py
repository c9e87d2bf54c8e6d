"""The cost of a spec on a model: full beside compressed, by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core.part import Part
from ..core.record import Record
from ..core.shape import ModelShape
from ..encoders.compressors.base import COMPRESSORS
from ..errors import InputError, UnsupportedModelError
from ..report import CompressionReport, SampleReport
from ..scorers.base import SCORERS
from ..selectors.base import SELECTORS
from ..spec import PipelineSpec, load_spec
from ..spec.schedule import ResolvedSchedule, resolve
from . import flops
from .encoder import reading_flops, rows_by_layer
from .flops import Attention

__all__ = ["Cost", "CostPrediction", "FlopsByPart", "of_report", "predict"]


class FlopsByPart(Record):
    """FLOPs of one prompt (one multiply-add is 2).

    Attributes:
        tower: vision tower on all images; less where a compressor merges tokens inside it.
        projector: projector on all visual tokens.
        prefill: decoder layers on the prompt, and the output head on its last row.
        compression: what a compressor reads off the tower and its own work.
        scoring: the scorers' own work.
        selection: the selectors' own work.
        decode: cached decode steps.
    """

    tower: int = 0
    projector: int = 0
    compression: int = 0
    prefill: int = 0
    scoring: int = 0
    selection: int = 0
    decode: int = 0

    @property
    def language(self) -> int:
        """All but tower, projector and compression."""
        return self.prefill + self.scoring + self.selection + self.decode

    @property
    def total(self) -> int:
        """Everything."""
        return self.tower + self.projector + self.compression + self.language


class Cost(Record):
    """One column of a prediction.

    Attributes:
        flops: FLOPs by part.
        kv_bytes: bytes of keys and values after the prefill, padding not counted.
        visual_by_layer: visual tokens that each decoder layer runs on.
        paper_flops: FastV's formula on `visual_by_layer`, comparable with published numbers and with nothing else: see
            `trio.cost.paper_flops`.
    """

    flops: FlopsByPart
    kv_bytes: int
    visual_by_layer: list[int]
    paper_flops: int


class CostPrediction(Record):
    """The cost of a spec on a model, full beside compressed.

    Attributes:
        spec: name of the spec.
        model: name of the model's shape.
        visual_tokens: visual tokens of the full model.
        text_tokens: the other tokens of the prompt.
        new_tokens: generated tokens; the first comes from the prefill, each further one is a decode step.
        attention: how attention was counted (`trio.cost.flops`).
        full: the model as it is.
        compressed: the model with the pipeline attached, overhead included.
        notes: what could not be counted.
    """

    spec: str
    model: str
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    attention: Attention
    full: Cost
    compressed: Cost
    notes: list[str] = Field(default_factory=list)

    @property
    def flops_reduction(self) -> float:
        """FLOPs of the full model / of the compressed one, all parts and the overhead included."""
        return self.full.flops.total / self.compressed.flops.total

    @property
    def language_reduction(self) -> float:
        """The same without tower, projector and compression."""
        return self.full.flops.language / self.compressed.flops.language

    @property
    def kv_reduction(self) -> float:
        """KV bytes of the full model / of the compressed one; 1.0 where both are empty."""
        return self.full.kv_bytes / self.compressed.kv_bytes if self.compressed.kv_bytes else 1.0

    @property
    def paper_reduction(self) -> float:
        """Reduction by FastV's formula; 1.0 without visual tokens, infinite where none is left in any layer."""
        if self.compressed.paper_flops:
            return self.full.paper_flops / self.compressed.paper_flops
        return float("inf") if self.full.paper_flops else 1.0

    @property
    def average_kept(self) -> float:
        """Visual tokens averaged over the decoder layers."""
        counts = self.compressed.visual_by_layer
        return sum(counts) / len(counts)

    @property
    def retention(self) -> float:
        """`average_kept` / `visual_tokens`; 1.0 without visual tokens."""
        return self.average_kept / self.visual_tokens if self.visual_tokens else 1.0


@dataclass(frozen=True)
class _Stage:
    """One stage on one sample: its place in the spec, layer, and (tokens in, tokens kept) of each group."""

    index: int
    layer: int
    groups: tuple[tuple[int, int], ...]

    @property
    def tokens_in(self) -> int:
        return sum(before for before, _ in self.groups)

    @property
    def kept(self) -> int:
        return sum(after for _, after in self.groups)


@dataclass(frozen=True)
class _Sample:
    """One sample: visual tokens by image, text tokens, tokens of each image that enter the decoder, and its stages.

    `before` are the visual tokens by image in front of `resize`.
    """

    images: tuple[int, ...]
    text: int
    entering: tuple[int, ...]
    stages: tuple[_Stage, ...]
    before: tuple[int, ...]

    @property
    def entered(self) -> int:
        return sum(self.entering)

    def by_layer(self, layers: int) -> list[int]:
        counts = [self.entered] * layers
        for stage in self.stages:
            counts[stage.layer :] = [stage.kept] * (layers - stage.layer)
        return counts


def predict(
    spec: PipelineSpec | str | Path | Mapping[str, Any],
    shape: ModelShape,
    *,
    images: Sequence[int] = (576,),
    text_tokens: int = 64,
    new_tokens: int = 0,
    compressed: Sequence[int] | None = None,
    attention: Attention = "dense",
) -> CostPrediction:
    """The cost of a spec for one prompt on a model of the given shape.

    Args:
        spec: what `load_spec` takes.
        shape: the model's shape.
        images: visual tokens of each image before any reduction, `resize` included (which is taken to reach the number
            that it aims at); empty for a text-only prompt.
        text_tokens: all other tokens of the prompt.
        new_tokens: tokens to generate; 0 and 1 both mean the prefill alone.
        compressed: tokens of each image after a compressor that decides its own count.
        attention: how query-key pairs are counted: see `trio.cost.flops`.

    Raises:
        SpecError: the spec is wrong, or does not fit a model of that depth.
        BudgetError: the counts cannot be met for these images.
        InputError: a number is negative, the prompt is empty, or `compressed` does not match `images`.
        UnsupportedModelError: the spec resizes images, and such a model gives every image or tile the same tokens.
    """
    for name, value in (("images", min(images, default=0)), ("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value < 0:
            raise InputError(f"{name}: found {value}; counts of tokens are 0 or more.")
    if text_tokens + sum(images) == 0:
        raise InputError("images and text_tokens: the prompt is empty; give at least one token.")
    if compressed is not None and len(compressed) != len(images):
        raise InputError(f"compressed: found {len(compressed)} counts for {len(images)} images; give one for each.")
    loaded = load_spec(spec)
    if loaded.resize is not None and shape.tower is not None and shape.tower.crop_patches is not None:
        raise UnsupportedModelError(
            f"resize: found {loaded.resize!r}, but a {shape.name} gives every image, or tile, the same number of "
            "tokens; leave `resize` out, or take compressor: {name: average-pool, keep: ...}"
        )
    resized = tuple(loaded.resized(image) for image in images)
    sample = _walk(resolve(loaded, shape.layers), resized, text_tokens, compressed, tuple(images))
    return _compare(loaded, shape, [sample], new_tokens, attention)


def of_report(
    report: CompressionReport,
    spec: PipelineSpec | str | Path | Mapping[str, Any],
    shape: ModelShape,
    *,
    new_tokens: int = 0,
    attention: Attention = "dense",
    before: Sequence[Sequence[int]] | None = None,
) -> CostPrediction:
    """The cost of what a run really kept, all samples of the batch together (padding not counted).

    Args:
        report: of a first turn (tokens that an earlier turn left in the cache are not in a report).
        spec: the spec that the run used.
        shape: the shape of the model that ran.
        new_tokens: tokens generated for each sample.
        attention: how query-key pairs are counted: see `trio.cost.flops`.
        before: for each sample the visual tokens of its images in front of `resize`, which no report knows; without it
            the full model is counted on the resized images, and `notes` says so.

    Raises:
        InputError: report, spec and shape do not belong together.
    """
    loaded = load_spec(spec)
    if report.num_layers != shape.layers:
        raise InputError(
            f"report: it is of a model with {report.num_layers} decoder layers, but shape {shape.name!r} has "
            f"{shape.layers}. Give the shape of the model that ran, trio.cost.shape_of(model.config)."
        )
    rows = zip(report.samples, report.layer_tokens, strict=True)
    samples = [_of_sample(sample, tokens, loaded) for sample, tokens in rows]
    notes = []
    if before is not None:
        if [len(images) for images in before] != [len(sample.images) for sample in samples]:
            raise InputError("before: the images are not those of the report; give the tokens of each of its images.")
        samples = [replace(one, before=tuple(images)) for one, images in zip(samples, before, strict=True)]
    elif loaded.resize is not None:
        notes = ["the full model is counted on the resized images: what they were before is in no report"]
    made = _compare(loaded, shape, samples, new_tokens, attention)
    return made.model_copy(update={"notes": [*notes, *made.notes]})


def _of_sample(sample: SampleReport, tokens: Sequence[int], spec: PipelineSpec) -> _Sample:
    if len(sample.stages) not in (0, len(spec.stages)):
        raise InputError(
            f"report: sample {sample.sample} went through {len(sample.stages)} stages, but spec {spec.name!r} has "
            f"{len(spec.stages)}. Give the spec of the run."
        )
    entered = tuple(image.start for image in sample.images)
    first = sample.visual_by_layer(1)[0] if tokens else 0
    stages = tuple(
        _Stage(index, stage.after_layer, tuple((group.tokens_in, group.kept) for group in stage.groups))
        for index, stage in enumerate(sample.stages)
    )
    given = tuple(image.tokens for image in sample.images)
    return _Sample(given, tokens[0] - first, entered, stages, given)


def _walk(
    schedule: ResolvedSchedule,
    images: tuple[int, ...],
    text: int,
    compressed: Sequence[int] | None,
    before: tuple[int, ...],
) -> _Sample:
    """What the schedule does to one sample; a count for the whole sample is shared in proportion between its images."""
    current = list(images)
    if schedule.compressor is not None and schedule.compressor_group() == "sample":
        total = schedule.compressed_count(sum(images))
        assert total is not None  # a compressor that decides its own count has no group
        current = _share(total, current)
    elif schedule.compressor is not None:
        counts = [schedule.compressed_count(image) if schedule.known else None for image in images]
        if None in counts and compressed is None:
            raise InputError(
                "compressor: it decides its own count, or counts by tile, so the cost depends on the image; give "
                "`compressed`, the tokens that it leaves of each image."
            )
        current = [
            given if count is None else count for count, given in zip(counts, compressed or current, strict=True)
        ]
    entered, stages = tuple(current), []
    for index, layer in enumerate(schedule.layers):
        groups: tuple[tuple[int, int], ...]
        if schedule.group(index) == "sample":
            kept = schedule.keep_count(index, sum(images), sum(current))
            groups, after = ((sum(current), kept),), _share(kept, current)
        else:
            after = [schedule.keep_count(index, n, now) for n, now in zip(images, current, strict=True)]
            groups = tuple(zip(current, after, strict=True))
        stages.append(_Stage(index, layer, groups))
        current = after
    return _Sample(images, text, entered, tuple(stages), before)


def _share(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` split in proportion to `sizes`, in whole numbers (running sums rounded down)."""
    whole, done, seen, parts = sum(sizes), 0, 0, []
    for size in sizes:
        seen += size
        upto = total * seen // whole if whole else 0
        parts.append(upto - done)
        done = upto
    return parts


def _compare(
    spec: PipelineSpec, shape: ModelShape, samples: Sequence[_Sample], new_tokens: int, attention: Attention
) -> CostPrediction:
    notes: dict[str, None] = {}
    if shape.tower is not None and (crop := shape.tower.crop_tokens):
        for tokens in sorted({tokens for sample in samples for tokens in sample.images if tokens % crop}):
            crops, _ = shape.tower.crops(tokens)
            notes[f"an image of {tokens} tokens is no whole number of crops; the tower is counted for {crops}"] = None
    plain = [_Sample(one.before, one.text, one.before, (), one.before) for one in samples]
    costs = [
        [_cost(sample, spec, shape, new_tokens, attention, notes) for sample in column] for column in (plain, samples)
    ]
    full, compressed = (_sum(column, shape.layers) for column in costs)
    return CostPrediction(
        spec=spec.name,
        model=shape.name,
        visual_tokens=sum(sum(sample.before) for sample in samples),
        text_tokens=sum(sample.text for sample in samples),
        new_tokens=new_tokens,
        attention=attention,
        full=full,
        compressed=compressed,
        notes=list(notes),
    )


def _cost(
    sample: _Sample,
    spec: PipelineSpec,
    shape: ModelShape,
    new_tokens: int,
    attention: Attention,
    notes: dict[str, None],
) -> Cost:
    visual = sample.by_layer(shape.layers)
    rows = [sample.text + count for count in visual]
    scoring = selection = 0
    for stage in sample.stages:
        if stage.kept == stage.tokens_in:
            continue  # nothing to lose: the runtime neither scores nor selects
        parts = spec.stages[stage.index]
        tokens = sample.text + stage.tokens_in
        scorer, selector = SCORERS.build(parts.scorer), SELECTORS.build(parts.selector)
        unknown = f"the scorer {parts.scorer.name!r} {_SILENT}"
        scoring += _part(scorer, shape, (tokens, stage.tokens_in, stage.kept), unknown, notes)
        unknown = f"the selector {parts.selector.name!r} {_SILENT}"
        groups = ((tokens, before, after) for before, after in stage.groups if before)
        selection += sum(_part(selector, shape, group, unknown, notes) for group in groups)
    tower, compression = _encoder_side(sample, spec, shape, notes)
    return Cost(
        flops=FlopsByPart(
            tower=tower,
            projector=sum(flops.projector_flops(shape, image) for image in sample.images),
            compression=compression,
            prefill=flops.prefill_flops(shape, rows, attention=attention),
            scoring=scoring,
            selection=selection,
            decode=flops.decode_flops(shape, rows, max(0, new_tokens - 1)),
        ),
        kv_bytes=sum(rows) * shape.kv_bytes_per_token,
        visual_by_layer=visual,
        paper_flops=flops.paper_flops(visual, shape.hidden, shape.intermediate),
    )


def _encoder_side(sample: _Sample, spec: PipelineSpec, shape: ModelShape, notes: dict[str, None]) -> tuple[int, int]:
    """The tower on all images, and what a compressor reads and computes for those that lose tokens."""
    reduced = [(n, k) for n, k in zip(sample.images, sample.entering, strict=True) if k < n]
    whole = sum(flops.tower_flops(shape.tower, image) for image in sample.images)
    if spec.compressor is None or not reduced:
        return whole, 0
    part, name = COMPRESSORS.build(spec.compressor), spec.compressor.name
    unknown = f"of the compressor {name!r} only what it reads off the tower is counted"
    own = sum(_part(part, shape, (tokens, tokens, kept), unknown, notes) for tokens, kept in reduced)
    if shape.tower is None:
        return 0, own
    signals, keep = part.reads(), resolve(spec, shape.layers).compressed_count
    own += sum(reading_flops(shape.tower, tokens, signals, keep) for tokens, _ in reduced)
    merged = rows_by_layer(shape.tower, signals, keep)
    if merged and shape.tower.heads is None:
        notes[f"how the compressor {name!r} compares keys is not counted: the tower's heads are not known"] = None
    # An image that loses nothing is merged like the others: the tower does not know the prompts yet.
    return sum(flops.tower_flops(shape.tower, image, merged) for image in sample.images), own


_SILENT = "says nothing of its cost (a method `flops`), so it is not counted"


def _part(part: Part, shape: ModelShape, counts: tuple[int, int, int], unknown: str, notes: dict[str, None]) -> int:
    """What a part says that it costs for (tokens, visual, keep); 0, and the note `unknown`, where it says nothing."""
    tokens, visual, keep = counts
    own = part.flops(shape, tokens=tokens, visual=visual, keep=keep)
    if own is None:
        notes[unknown] = None
    return own or 0


def _sum(costs: Sequence[Cost], layers: int) -> Cost:
    parts = {name: sum(getattr(cost.flops, name) for cost in costs) for name in FlopsByPart.model_fields}
    return Cost(
        flops=FlopsByPart(**parts),
        kv_bytes=sum(cost.kv_bytes for cost in costs),
        visual_by_layer=[sum(cost.visual_by_layer[layer] for cost in costs) for layer in range(layers)],
        paper_flops=sum(cost.paper_flops for cost in costs),
    )
