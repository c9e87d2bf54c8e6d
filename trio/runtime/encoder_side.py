"""A compressor at work: between the tower's signals and the first decoder layer.

Stock code encodes the pictures and puts a feature at every placeholder. What a compressor leaves is then written at the
places of the tokens that it keeps, and the others are dropped in front of the first decoder layer, exactly as a stage
would: embeddings, masks, positions, caches and features that come later shrink by the same code, in every family.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from ..core.backbone import Backbone
from ..core.hooking import Owner
from ..core.patches import PatchMap
from ..core.tokens import CLS, PATCH, ImageTokens, Signal, VisualTokens
from ..errors import InputError, UnsupportedModelError
from .record import CompressedRecord
from .stage import Prefill
from .state import Counts, drop

if TYPE_CHECKING:
    from ..encoders.compressors.base import Compressor
    from ..encoders.reading.reader import Reading

#: Where the whole picture's attention is read that tells how much of a number each of its tiles gets.
SPLIT_SIGNAL = Signal("attention", -2)


@dataclass(frozen=True)
class BoundCompressor:
    """A compressor of a spec, resolved on a model.

    Attributes:
        name: what reports call it.
        compressor: drops or merges.
        per: what a number holds for.
        split: how the number of an image or a sample is split over its tiles.
        keep_count: the number for a group from the tokens it has; None where the compressor decides.
    """

    name: str
    compressor: Compressor
    per: Literal["image", "sample", "tile"]
    split: Literal["even", "saliency"]
    keep_count: Callable[[int], int | None]


@dataclass(frozen=True)
class _Source:
    """What is known of one image on the encoder side; no patches where nothing is."""

    image: ImageTokens
    patches: PatchMap | None = None
    offset: int = 0
    number: int = 0
    reading: Reading | None = None

    def pieces(self) -> list[torch.Tensor]:
        """Its tokens by input of the tower, int64 on the CPU."""
        if self.patches is None:
            return [torch.arange(self.image.tokens)]
        tiles = self.patches.tile
        return [(tiles == tile).nonzero().squeeze(1) for tile in sorted(set(tiles.tolist()))]


class EncoderSide:
    """Reads the tower while it runs, and compresses what it gave once the prompts are known."""

    def __init__(self, backbone: Backbone, bound: BoundCompressor) -> None:
        """Binds a compressor.

        Raises:
            UnsupportedModelError: the tower is not known, or does not offer what the compressor reads.
        """
        self._backbone = backbone
        self._bound = bound
        compressor = bound.compressor
        self._blocks = backbone.projected_blocks if compressor.space == "tower" else ()
        wanted = [*compressor.reads(), *(Signal("hidden", block) for block in self._blocks)]
        if compressor.wants_cls and self._blocks and "cls" in backbone.tower_offers():
            wanted += [Signal("cls", block) for block in self._blocks]
        if bound.split == "saliency":
            wanted.append(SPLIT_SIGNAL)
        self._signals = tuple(dict.fromkeys(wanted))
        try:
            self._reader = backbone.reader(self._signals, keep=bound.keep_count) if self._signals else None
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"compressor: {bound.name!r} does not fit this {type(backbone.model).__name__}: {error}. Its "
                "parameters may name other blocks (trio list compressors)"
            ) from error
        self._readings: dict[str, Reading] = {}

    @property
    def reads_tower(self) -> bool:
        """Whether it has to see the vision tower at work."""
        return self._reader is not None

    def attach(self, owner: Owner) -> None:
        """Puts the reader's hooks on the tower, in the name of an owner."""
        if self._reader is not None:
            self._reader.attach(owner)

    def detach(self) -> None:
        """Takes them off again, and forgets what was read."""
        if self._reader is not None:
            self._reader.detach()
        self._readings.clear()

    def begin(self) -> None:
        """An encoder method is about to run; what a failed one left is forgotten."""
        if self._reader is not None:
            self._reader.clear()

    def encoded(self, modality: str) -> None:
        """An encoder method has run: keeps what was read until it runs again."""
        if self._reader is not None:
            self._readings[modality] = self._reader.take()

    def run(self, prefill: Prefill, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compresses the pictures of a forward and updates the prefill.

        Args:
            prefill: the running forward, nothing dropped yet; its sequence and record are updated.
            hidden: ``(B, S, D)``, what enters the first decoder layer.

        Returns:
            The hidden states with the new features in their places, and int64 ``(B, S')``, the columns that remain;
            None where no picture loses a token.
        """
        sequence = prefill.sequence
        sources = self._sources(prefill)
        batch, most = sequence.origin.shape
        device = hidden.device
        keep = torch.zeros(batch, most, dtype=torch.bool, device=device)
        owner = torch.full((batch, most), -1, dtype=torch.int64, device=device)
        counts: list[tuple[int, ...]] = []
        images: list[tuple[ImageTokens, ...]] = []
        asked: list[tuple[int | None, ...]] = []
        features: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        shorter = False
        for sample, row in enumerate(sources):
            plans = self._plan(row)
            first, left, now = 0, [], []
            for number, (source, plan) in enumerate(zip(row, plans, strict=True)):
                kept, origins = 0, source.image
                for tile, (piece, k) in enumerate(plan):
                    here = (first + piece).to(device)
                    if k is not None and k >= len(piece):
                        keep[sample, here], owner[sample, here] = True, here
                        kept += len(piece)
                        continue
                    shorter = True
                    if k == 0:
                        continue
                    seed = zlib.crc32(f"{prefill.seeds[sample]}/{number}/{tile}".encode())
                    places = sequence.visual_index[sample, here]
                    tokens = self._tokens(source, piece, hidden[sample, places], seed)
                    out = self._bound.compressor.compress(tokens, len(piece) if k is None else k)
                    result = _placed(out, len(piece))
                    keep[sample, here[result.slots]] = True
                    went = out.merged
                    owner[sample, here] = torch.where(went < 0, -1, here[result.slots][went.clamp_min(0)])
                    changed = (out.origins.kind != PATCH).nonzero().squeeze(1)
                    new = torch.arange(out.tokens) if result.shifted else changed
                    if len(new):
                        features.append(out.features[new.to(device)])
                        columns.append(sample * hidden.shape[1] + places[result.slots[new.to(device)]])
                    origins = _replaced(origins, piece[result.slots.cpu()], out.origins)
                    kept += out.tokens
                first += source.image.tokens
                left.append(kept)
                now.append(origins)
            counts.append(tuple(left))
            images.append(tuple(now))
            asked.append(tuple(_sum([k for _, k in plan]) for plan in plans))
        if not shorter:
            return None
        after: Counts = tuple(counts)
        if features:
            visible = self._visible(torch.cat(features)).to(hidden)
            hidden = hidden.flatten(0, 1).index_put((torch.cat(columns),), visible).view_as(hidden)
        prefill.record.images = tuple(images)
        prefill.sequence, remaining = drop(sequence, keep, after)
        lines = prefill.sequence.newlines
        prefill.record.compressed = CompressedRecord(
            self._bound.name, keep, owner, after, tuple(asked), () if lines is None else lines.counts
        )
        return hidden, remaining

    # Which patches, and how many tokens

    def _sources(self, prefill: Prefill) -> list[list[_Source]]:
        images, modalities = prefill.record.images, prefill.modalities
        found: list[list[_Source]] = [[_Source(image) for image in row] for row in images]
        for modality, arguments in prefill.encoded.items():
            members = [
                [place for place, own in enumerate(modalities[sample]) if own == modality]
                for sample in range(len(images))
            ]
            held = [images[sample][place] for sample, row in enumerate(members) for place in row]
            if not held:
                continue
            given = self._backbone.encoded_images(held, arguments)
            repeats, rest = divmod(len(held), given) if given else (0, 1)
            if rest or not repeats or len(images) % repeats:
                raise InputError(
                    f"compressor: the prompts hold {len(held)} pictures, the last encoding brought {given}: the "
                    "features were computed for other prompts, or while the pipeline was not attached; pass pixels"
                )
            reading, number, offset = self._readings.get(modality), 0, 0
            for group in range(0, len(images), repeats):
                for place in range(len(members[group])):
                    patches = self._backbone.patch_map(images[group][members[group][place]], number, arguments)
                    for sample in range(group, group + repeats):
                        at = members[sample][place]
                        found[sample][at] = _Source(images[sample][at], patches, offset, number, reading)
                    number, offset = number + 1, offset + (0 if patches is None else patches.total)
            if reading is not None and offset != sum(reading.inputs):
                raise InputError(
                    f"compressor: the prompts' pictures have {offset} patches, the tower gave {sum(reading.inputs)}: "
                    "the features were computed for other prompts, or while the pipeline was not attached; pass pixels"
                )
        if self._signals and any(source.reading is None for row in found for source in row):
            raise InputError(
                "compressor: the tower was not seen at work on these pictures, so its signals are not known; pass "
                "pixels and let the model encode them while the pipeline is attached"
            )
        return found

    def _plan(self, row: Sequence[_Source]) -> list[list[tuple[torch.Tensor, int | None]]]:
        """For each image its pieces, and how many tokens of each are kept."""
        pieces = [source.pieces() for source in row]
        sizes = [[len(piece) for piece in image] for image in pieces]
        bound = self._bound
        if bound.per == "tile":
            counts = [[bound.keep_count(size) for size in image] for image in sizes]
        else:
            totals = [bound.keep_count(sum(image)) for image in sizes]
            if bound.per == "sample":
                whole = [sum(image) for image in sizes]
                total = bound.keep_count(sum(whole))
                totals = [None] * len(row) if total is None else [*split(total, whole, whole)]
            counts = [
                self._split(total, source, tiles) for source, tiles, total in zip(row, pieces, totals, strict=True)
            ]
        return [list(zip(image, ks, strict=True)) for image, ks in zip(pieces, counts, strict=True)]

    def _split(self, total: int | None, source: _Source, pieces: list[torch.Tensor]) -> list[int | None]:
        """An image's number over its pieces."""
        if total is None:
            return [None] * len(pieces)
        sizes = [len(piece) for piece in pieces]
        return [*split(total, sizes, self._weights(source, pieces, sizes))]

    def _weights(self, source: _Source, pieces: list[torch.Tensor], sizes: list[int]) -> list[float]:
        """How a number is shared: by tokens, or the tiles' part of it by the attention to their places."""
        image = source.image
        if self._bound.split == "even" or len(pieces) < 3 or source.patches is None or source.reading is None:
            return [float(size) for size in sizes]
        attention = self._signal(source, SPLIT_SIGNAL, pieces[0]).float().cpu()
        (tall, wide), (rows, columns) = image.grids[0], image.grids[-1]
        row = (image.row[pieces[0]] + 0.5) / tall * rows
        column = (image.column[pieces[0]] + 0.5) / wide * columns
        mass = []
        for piece in pieces[1:]:
            r, c = image.row[piece], image.column[piece]
            inside = (row >= r.min()) & (row < r.max() + 1) & (column >= c.min()) & (column < c.max() + 1)
            mass.append(float(attention[inside].sum()))
        tiles = sum(sizes[1:]) / max(sum(mass), 1e-12)
        return [float(sizes[0]), *(share * tiles for share in mass)]

    # Features

    def _tokens(self, source: _Source, piece: torch.Tensor, language: torch.Tensor, seed: int) -> VisualTokens:
        signals = {
            signal: self._signal(source, signal, piece).to(language.device)
            for signal in self._bound.compressor.reads()
            if signal.kind != "cls"
        }
        features, class_token = language, None
        if self._blocks:
            features = torch.cat(
                [self._signal(source, Signal("hidden", block), piece) for block in self._blocks], dim=-1
            ).to(language.device)
            if Signal("cls", self._blocks[0]) in self._signals:
                class_token = torch.cat(
                    [self._signal(source, Signal("cls", block), piece) for block in self._blocks], dim=-1
                ).to(language.device)
        origins = source.image.select(piece)
        return VisualTokens.start(features, origins, signals, class_token=class_token, seed=seed)

    def _signal(self, source: _Source, signal: Signal, piece: torch.Tensor) -> torch.Tensor:
        """A signal of some tokens of an image: the mean over the patches that each stands for (groups: the first's)."""
        assert source.reading is not None and source.patches is not None  # checked in _sources
        values: torch.Tensor = source.reading.values[signal]
        if signal.kind == "cls":
            start = source.offset + int(source.patches.patches[piece[0], 0])
            inputs, end = source.reading.inputs, 0
            for number, size in enumerate(inputs):
                end += size
                if start < end:
                    return values[number]
        index = (source.offset + source.patches.patches[piece]).to(values.device)
        return values[index[:, 0]] if index.shape[1] == 1 or signal.kind == "groups" else values[index].mean(1)

    def _visible(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the language model takes them."""
        return self._backbone.project(features) if self._blocks else features


@dataclass(frozen=True)
class _Result:
    """Where the tokens of a compressor go: slots in rising order, and whether any stands elsewhere than its own."""

    slots: torch.Tensor
    shifted: bool


def _placed(out: VisualTokens, tokens: int) -> _Result:
    """Slots for tokens in their order: their own places; a class token takes a free one, and others make way for it."""
    if not out.tokens or int(out.origins.kind[0]) != CLS:
        return _Result(out.places, False)
    places = out.places.cpu()[1:]
    free = torch.ones(tokens, dtype=torch.int8).index_fill(0, places, 0).argmax()
    slots = torch.cat([places, free[None]]).sort().values
    return _Result(slots.to(out.places.device), not torch.equal(slots[1:], places))


def _sum(counts: Sequence[int | None]) -> int | None:
    """A sum that is not known where a part is not."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _replaced(image: ImageTokens, slots: torch.Tensor, tokens: ImageTokens) -> ImageTokens:
    """An image with some of its tokens' origins replaced."""
    fields = {name: getattr(image, name).clone() for name in ("kind", "frame", "row", "column", "size")}
    for name, values in fields.items():
        values[slots] = getattr(tokens, name)
    return replace(image, **fields)


def split(total: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """A number of tokens shared out by weight, in whole numbers, none above its size: largest remainders first.

    Args:
        total: tokens to share; all are given where there is room.
        sizes: room of each part.
        weights: share of each part, 0 or more; parts of weight 0 come last.
    """
    out = [0] * len(sizes)
    rest = min(total, sum(sizes))
    while rest:
        open_ = [n for n, size in enumerate(sizes) if out[n] < size]
        heavy = [n for n in open_ if weights[n] > 0] or open_
        whole = sum(weights[n] for n in heavy)
        exact = {n: rest * (weights[n] / whole if whole else 1 / len(heavy)) for n in heavy}
        given = {n: min(int(share + 1e-9), sizes[n] - out[n]) for n, share in exact.items()}
        if not any(given.values()):
            for n in sorted(heavy, key=lambda n: given[n] - exact[n])[:rest]:
                given[n] = 1
        for n, count in given.items():
            out[n] += count
            rest -= count
    return out


def merged_features(features: torch.Tensor, record: CompressedRecord) -> torch.Tensor:
    """Features that come later in the language model, merged as the tokens were: the mean over each token's members.

    Args:
        features: ``(B, N, D)``, for the tokens at the start.
        record: what the compressor did.
    """
    owner = record.owner.to(features.device)
    batch, most, width = features.shape
    index = torch.where(owner < 0, most, owner)[..., None].expand(-1, -1, width)
    total = features.new_zeros(batch, most + 1, width, dtype=torch.float32).scatter_add(1, index, features.float())
    count = features.new_zeros(batch, most + 1, 1, dtype=torch.float32).scatter_add(
        1, index[..., :1], torch.ones_like(features[..., :1], dtype=torch.float32)
    )
    mean = (total / count.clamp_min(1))[:, :most]
    return torch.where(record.kept.to(features.device)[..., None], mean.to(features.dtype), features)
