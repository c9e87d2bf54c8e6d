"""What a compressed prefill did: pydantic records that serialise to JSON.

The runtime keeps indices as tensors on the device and builds these records only when `Pipeline.report` is read, so
every field here takes plain Python numbers and lists. This module imports neither torch nor transformers.

Vocabulary: a *group* is the set of visual tokens that one count is shared by: one image, or (``per: sample``) all
images of a sample. ``indices`` always count the visual tokens that the full model gives the group, in raster order; so
the indices of a compressor and of two stages can be compared directly. A merged token stands at the place of one of its
members.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from ..core.record import Document, Record

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TokenKind = Literal["patch", "cls", "merged", "newline"]
ReportLevel = Literal["counts", "full"]


class Origins(Record):
    """Where N visual tokens come from, as columns of equal length N (one Python object a column, not one a token).

    Attributes:
        image: index of the image in its sample, from 0.
        kind: ``patch``, ``cls``, ``merged`` (stands for several patches) or ``newline`` (LLaVA-NeXT's row ends).
        frame: index of the video frame or image tile, 0 for a plain image.
        row: row in the image's grid of visual tokens, from 0 at the top; of no meaning for ``cls`` and ``newline``.
        column: column in that grid, from 0 at the left; of no meaning for ``cls`` and ``newline``.
        size: how many patches the token stands for (0 for ``newline``).
    """

    image: list[Count]
    kind: list[TokenKind]
    frame: list[Count]
    row: list[Annotated[int, Field(ge=-1)]]
    column: list[Annotated[int, Field(ge=-1)]]
    size: list[Count]

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of origins must have one length, found {lengths}")
        return self

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.image)

    def take(self, indices: list[int]) -> Origins:
        """The origins at `indices` (each in 0..N-1), in that order."""
        return Origins(**{name: [getattr(self, name)[i] for i in indices] for name in type(self).model_fields})

    @classmethod
    def of_grid(cls, rows: int, columns: int, *, image: int = 0, frame: int = 0) -> Origins:
        """The origins of a plain grid of ``rows * columns`` patches in raster order."""
        n = rows * columns
        return cls(
            image=[image] * n,
            kind=["patch"] * n,
            frame=[frame] * n,
            row=[i // columns for i in range(n)],
            column=[i % columns for i in range(n)],
            size=[1] * n,
        )


class GroupReport(Record):
    """What one stage did to one group of visual tokens.

    Attributes:
        image: index of the image in its sample; None where the count is shared by all images of the sample.
        tokens_in: tokens that entered the stage.
        asked: the count that the spec asked for.
        kept: tokens that left the stage; smaller than `asked` only when fewer entered.
        indices: `kept` indices, rising, into the group's visual tokens in the full model.
        origins: of the kept tokens, in the order of `indices`.
        saliency: level ``full``: one number for each of the `tokens_in` tokens, in order (higher = keep).
        notes: what a reader should know, e.g. "kept all: fewer tokens than the count".
    """

    image: Count | None
    tokens_in: Count
    asked: Count
    kept: Count
    indices: list[Count]
    origins: Origins
    saliency: list[FiniteFloat] | None = None
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kept > self.tokens_in:
            raise ValueError(f"kept {self.kept} of {self.tokens_in} tokens: a stage cannot add tokens")
        if not len(self.indices) == len(self.origins) == self.kept:
            raise ValueError(
                f"kept {self.kept} tokens, but {len(self.indices)} indices and {len(self.origins)} origins were given"
            )
        if any(b <= a for a, b in pairwise(self.indices)):
            raise ValueError("indices must rise strictly (raster order, each token once)")
        if self.saliency is not None and len(self.saliency) != self.tokens_in:
            raise ValueError(f"{len(self.saliency)} saliencies were given for {self.tokens_in} tokens")
        return self


class StageReport(Record):
    """What one stage did to one sample; one entry in `groups` for each image, or one for all of them.

    `newlines` counts the newline tokens left, which are structure and in no other count.
    """

    after_layer: Count
    scorer: str
    selector: str
    groups: list[GroupReport]
    newlines: Count = 0
    notes: list[str] = Field(default_factory=list)

    @property
    def tokens_in(self) -> int:
        """Visual tokens of the sample that entered the stage."""
        return sum(group.tokens_in for group in self.groups)

    @property
    def kept(self) -> int:
        """Visual tokens of the sample that left the stage."""
        return sum(group.kept for group in self.groups)


class CompressedImage(Record):
    """What a compressor did to one image.

    Attributes:
        tokens_in: visual tokens of the full model.
        asked: the count that the spec asked for; None where the compressor decides.
        kept: tokens that it left.
        indices: their `kept` places among the `tokens_in`, rising.
        origins: of the tokens left, in the order of `indices`.
        merged: for each of the `tokens_in` the place of the token that it went into, -1 where it was dropped.
    """

    tokens_in: Count
    asked: Count | None
    kept: Count
    indices: list[Count]
    origins: Origins
    merged: list[Annotated[int, Field(ge=-1)]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.indices) == len(self.origins) == self.kept <= self.tokens_in:
            raise ValueError(
                f"kept {self.kept} of {self.tokens_in} tokens, but {len(self.indices)} indices and "
                f"{len(self.origins)} origins were given"
            )
        if any(b <= a for a, b in pairwise(self.indices)):
            raise ValueError("indices must rise strictly (raster order, each token once)")
        if len(self.merged) != self.tokens_in or not set(self.merged) <= {-1, *self.indices}:
            raise ValueError("merged must name a kept place, or -1, for each token")
        return self


class CompressorReport(Record):
    """What a compressor did to one sample, image by image.

    `newlines` counts the newline tokens left, which are structure and in no other count.
    """

    name: str
    images: list[CompressedImage]
    newlines: Count = 0

    @property
    def tokens_in(self) -> int:
        """Visual tokens of the sample in the full model."""
        return sum(image.tokens_in for image in self.images)

    @property
    def kept(self) -> int:
        """Visual tokens of the sample that entered the language model."""
        return sum(image.kept for image in self.images)


class ImageReport(Record):
    """One image of a sample.

    Attributes:
        tokens: visual tokens that the full model gives the image.
        grid: (rows, columns) of these tokens where they form one grid, else None (a tiled image, a video).
        grids: (rows, columns) of each frame (of a tiled image: the whole image, then the tiles put together); the
            last one holds for all later frames.
        placed: False where the adapter does not know where on the image the tokens lie.
        size_px: (width, height) of the image in pixels, where known.
        entered: tokens that entered the language model after a compressor; None: no compressor, `tokens` entered.
    """

    tokens: Count
    grid: tuple[int, int] | None = None
    grids: list[tuple[int, int]] = Field(default_factory=list)
    placed: bool = True
    size_px: tuple[int, int] | None = None
    entered: Count | None = None

    @property
    def start(self) -> int:
        """Tokens that entered the language model."""
        return self.tokens if self.entered is None else self.entered


class SampleReport(Record):
    """One row of the batch: its images, what a compressor left of them and what each stage kept, in the order in which
    they ran; `compressor` is None where none ran or no image lost a token.

    `newlines` counts the newline tokens at the start, which are structure and in no other count.
    """

    sample: Count
    images: list[ImageReport]
    newlines: Count = 0
    compressor: CompressorReport | None = None
    stages: list[StageReport] = Field(default_factory=list)

    @model_validator(mode="after")
    def _stages_rise(self) -> Self:
        layers = [stage.after_layer for stage in self.stages]
        if any(b <= a for a, b in pairwise(layers)):
            raise ValueError(f"stages must run in the order of their layers, found {layers}")
        return self

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the full model."""
        return sum(image.tokens for image in self.images)

    @property
    def kept_by_stage(self) -> list[int]:
        """Visual tokens left after each stage."""
        return [stage.kept for stage in self.stages]

    def kept_of_images(self, stage: int) -> list[list[int]]:
        """For each image the tokens kept by a stage, as places among the image's own tokens."""
        kept: list[list[int]] = [[] for _ in self.images]
        if stage >= len(self.stages):
            return kept
        first = [sum(image.tokens for image in self.images[:number]) for number in range(len(self.images))]
        for group in self.stages[stage].groups:
            if group.image is not None:
                kept[group.image] += group.indices
                continue
            for number, index in zip(group.origins.image, group.indices, strict=True):
                kept[number].append(index - first[number])
        return kept

    def visual_by_layer(self, num_layers: int) -> list[int]:
        """Visual tokens that each of the `num_layers` layers ran on."""
        counts = [sum(image.start for image in self.images)] * num_layers
        for stage in self.stages:
            counts[stage.after_layer :] = [stage.kept] * max(0, num_layers - stage.after_layer)
        return counts

    def newlines_by_layer(self, num_layers: int) -> list[int]:
        """Newline tokens that each of the `num_layers` layers ran on."""
        counts = [self.newlines if self.compressor is None else self.compressor.newlines] * num_layers
        for stage in self.stages:
            counts[stage.after_layer :] = [stage.newlines] * max(0, num_layers - stage.after_layer)
        return counts

    def average_kept(self, num_layers: int) -> float:
        """Visual tokens averaged over the decoder layers, as the papers count them; 0.0 without layers."""
        return sum(self.visual_by_layer(num_layers)) / num_layers if num_layers else 0.0


class KVBytes(Record):
    """Bytes of keys and values after the prefill, all layers and samples together, from the cache's own tensors.

    Attributes:
        measured: bytes that the cache holds.
        full_equivalent: bytes that it would hold had no visual token been dropped (same dtype, same padding).
    """

    full_equivalent: Count
    measured: Count

    @property
    def reduction(self) -> float:
        """`full_equivalent` / `measured`, e.g. 5.1 for 5.1 times fewer; 1.0 for an empty cache."""
        return self.full_equivalent / self.measured if self.measured else 1.0


class CompressionReport(Document):
    """What a pipeline did in one prefill.

    Attributes:
        spec_name: name of the spec.
        model: class name of the model.
        adapter: name of the adapter.
        num_layers: decoder layers of the language model.
        samples: one entry for each row of the batch.
        layer_lengths: padded sequence length in each layer, `num_layers` numbers.
        layer_tokens: for each sample, its valid (not padding) tokens in each layer, text and visual.
        positions: ``compact`` (survivors renumbered) or ``original`` (each keeps its own).
        notes: what a reader should know about the whole run, e.g. that the probe fell back to whole layers and why.
        level: ``counts`` or ``full``.
        resize: what the spec asks of images in front of the processor, where it does. A pipeline cannot see it: all
            numbers here are of what the processor gave.
        timing: level ``full``: seconds by phase; phases are ``prefill``, ``scoring``, ``selection``, ``decode``
            (scoring and selection happen within the prefill and are part of its time).
        kv_bytes: level ``full``: measured cache size.
    """

    spec_name: str
    model: str
    adapter: str
    num_layers: Count
    samples: list[SampleReport]
    layer_lengths: list[Count]
    layer_tokens: list[list[Count]]
    positions: Literal["compact", "original"]
    notes: list[str] = Field(default_factory=list)
    level: ReportLevel = "counts"
    resize: int | str | None = None
    timing: dict[str, Seconds] | None = None
    kv_bytes: KVBytes | None = None

    @model_validator(mode="after")
    def _by_layer(self) -> Self:
        if len(self.layer_lengths) != self.num_layers:
            raise ValueError(f"layer_lengths has {len(self.layer_lengths)} entries for {self.num_layers} layers")
        if len(self.layer_tokens) != len(self.samples):
            raise ValueError(f"layer_tokens has {len(self.layer_tokens)} rows for {len(self.samples)} samples")
        for row, tokens in enumerate(self.layer_tokens):
            if len(tokens) != self.num_layers:
                raise ValueError(f"layer_tokens[{row}] has {len(tokens)} entries for {self.num_layers} layers")
        return self

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the full model, all samples together."""
        return sum(sample.visual_tokens for sample in self.samples)

    @property
    def kept_by_stage(self) -> list[list[int]]:
        """For each sample, the visual tokens left after each stage."""
        return [sample.kept_by_stage for sample in self.samples]

    @property
    def average_kept_by_sample(self) -> list[float]:
        """For each sample, its visual tokens averaged over the decoder layers."""
        return [sample.average_kept(self.num_layers) for sample in self.samples]

    @property
    def average_kept(self) -> float:
        """Visual tokens averaged over the decoder layers, all samples together (compare with `visual_tokens`)."""
        return sum(self.average_kept_by_sample)

    @property
    def retention(self) -> float:
        """`average_kept` / `visual_tokens`, in 0..1; 1.0 where there was no visual token to lose."""
        return self.average_kept / self.visual_tokens if self.visual_tokens else 1.0

    def selection(self) -> list[list[list[list[int]]]]:
        """The kept indices by stage, sample and image, in the form that `Pipeline.replay` takes."""
        stages = max((len(sample.stages) for sample in self.samples), default=0)
        return [[sample.kept_of_images(stage) for sample in self.samples] for stage in range(stages)]

    def summary(self) -> str:
        """A few plain lines for people: counts by sample and stage, then the notes."""
        lines = [
            f"{self.spec_name} on {self.model} ({self.num_layers} layers, positions {self.positions}): "
            f"{self.visual_tokens} visual tokens, {self.average_kept:.1f} kept on average ({self.retention:.1%})"
        ]
        if self.resize is not None:
            size = self.resize if isinstance(self.resize, str) else f"{self.resize} tokens"
            lines.append(f"  asked of the processor: images resized to {size}; the numbers are of what it gave")
        for sample, average in zip(self.samples, self.average_kept_by_sample, strict=True):
            done = sample.compressor
            steps = [] if done is None else [f"{done.name}: {done.kept} of {done.tokens_in}"]
            steps += [f"after layer {stage.after_layer}: {stage.kept} of {stage.tokens_in}" for stage in sample.stages]
            what = "; ".join(steps) or "nothing ran"
            lines.append(f"  sample {sample.sample}: {sample.visual_tokens} tokens; {what}; average {average:.1f}")
        if self.kv_bytes is not None:
            kv = self.kv_bytes
            lines.append(f"  KV cache: {kv.full_equivalent:,} -> {kv.measured:,} bytes ({kv.reduction:.2f}x)")
        if self.timing:
            lines.append("  seconds: " + ", ".join(f"{phase} {value:.4f}" for phase, value in self.timing.items()))
        lines.extend(f"  note: {note}" for note in self._all_notes())
        return "\n".join(lines)

    def __rich__(self) -> str:
        """What rich prints."""
        return self.summary().replace("[", r"\[")

    def _all_notes(self) -> list[str]:
        notes = list(self.notes)
        for sample in self.samples:
            for stage in sample.stages:
                where = f"sample {sample.sample}, after layer {stage.after_layer}"
                notes.extend(f"{where}: {note}" for note in stage.notes)
                for group in stage.groups:
                    place = where if group.image is None else f"{where}, image {group.image}"
                    notes.extend(f"{place}: {note}" for note in group.notes)
        return notes
