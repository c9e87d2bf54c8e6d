"""A compressor at work: between the tower's signals and the first decoder layer.

Stock code encodes the images and puts a feature at every placeholder. What a compressor leaves is then written at the
columns of the tokens that it keeps, and the others are dropped in front of the first decoder layer, exactly as a stage
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
from ..core.tokens import CLS, PATCH, ImageTokens, Signal, VisualTokens
from ..errors import InputError, UnsupportedModelError
from .encoded import EncodedImage, match_images
from .forward import Prefill
from .record import CompressedRecord
from .state import Counts, Images, drop

if TYPE_CHECKING:
    from ..encoders.compressors.base import Compressor
    from ..encoders.reading.reader import Reading

#: Where the whole image's attention is read that tells how much of a number each of its tiles gets.
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
class _Source(EncodedImage):
    """An image on the encoder side, with what was read off the tower while it was encoded (None where nothing was)."""

    reading: Reading | None = None


@dataclass(frozen=True)
class _Piece:
    """The visual tokens of one input of the vision tower (a tile, a frame), and how many of them are asked for.

    Attributes:
        sample: in the batch.
        number: of the image in the sample.
        tile: of the piece in the image.
        source: the image.
        members: int64 ``(n,)`` on the CPU, the piece's tokens among the image's.
        first: visual tokens of the sample in front of the image.
        k: tokens to leave; None where the compressor decides.
    """

    sample: int
    number: int
    tile: int
    source: _Source
    members: torch.Tensor
    first: int
    k: int | None

    @property
    def stays_whole(self) -> bool:
        """Whether all its tokens are kept as they are."""
        return self.k is not None and self.k >= len(self.members)


@dataclass(frozen=True)
class _Compressed:
    """What a compressor left of a piece.

    Attributes:
        tokens: the m tokens left.
        slots: int64 ``(m,)``, the tokens of the piece in whose columns they are written, in rising order.
        rewritten: int64, those of the m whose features are not the ones that stand in their column already.
    """

    tokens: VisualTokens
    slots: torch.Tensor
    rewritten: torch.Tensor


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
        signals = [*compressor.reads(), *(Signal("hidden", block) for block in self._blocks)]
        if compressor.wants_cls and self._blocks and "cls" in backbone.tower_offers():
            signals += [Signal("cls", block) for block in self._blocks]
        if bound.split == "saliency":
            signals.append(SPLIT_SIGNAL)
        self._signals = tuple(dict.fromkeys(signals))
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
        """Compresses the images of a forward and updates the prefill.

        Args:
            prefill: the running forward, nothing dropped yet; its state and record are updated.
            hidden: ``(B, S, D)``, what enters the first decoder layer.

        Returns:
            The hidden states with the new features in their columns, and int64 ``(B, S')``, the columns that remain;
            None where no image loses a token.
        """
        pieces = self._plan(prefill)
        if all(piece.stays_whole for piece in pieces):
            return None
        compressed = [
            None if piece.stays_whole or piece.k == 0 else self._compress(piece, prefill, hidden) for piece in pieces
        ]
        return self._write_back(prefill, hidden, pieces, compressed)

    def _plan(self, prefill: Prefill) -> list[_Piece]:
        """The pieces of all images in order, with the number of tokens to leave of each."""
        pieces = []
        for sample, row in enumerate(self._sources(prefill)):
            first = 0
            for number, (source, parts) in enumerate(zip(row, self._shares(row), strict=True)):
                pieces += [
                    _Piece(sample, number, tile, source, members, first, k) for tile, (members, k) in enumerate(parts)
                ]
                first += source.image.tokens
        return pieces

    def _compress(self, piece: _Piece, prefill: Prefill, hidden: torch.Tensor) -> _Compressed:
        """Runs the compressor on one piece."""
        seed = zlib.crc32(f"{prefill.seeds[piece.sample]}/{piece.number}/{piece.tile}".encode())
        columns = _columns(piece, prefill)
        tokens = self._tokens(piece.source, piece.members, hidden[piece.sample, columns], seed)
        size = len(piece.members)
        out = self._bound.compressor.compress(tokens, size if piece.k is None else piece.k)
        slots, shifted = _slots(out, size)
        rewritten = torch.arange(out.tokens) if shifted else (out.origins.kind != PATCH).nonzero().squeeze(1)
        return _Compressed(out, slots, rewritten.to(hidden.device))

    def _write_back(
        self,
        prefill: Prefill,
        hidden: torch.Tensor,
        pieces: Sequence[_Piece],
        compressed: Sequence[_Compressed | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts what is left into the hidden states, the prefill's state and its record; see `run`."""
        record, device = prefill.record, hidden.device
        keep = torch.zeros(prefill.state.token_index.shape, dtype=torch.bool, device=device)
        merge_map = torch.full(keep.shape, -1, dtype=torch.int64, device=device)
        images = [list(row) for row in record.images]
        features: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        for piece, result in zip(pieces, compressed, strict=True):
            index = (piece.first + piece.members).to(device)
            if result is None:
                if piece.stays_whole:
                    keep[piece.sample, index], merge_map[piece.sample, index] = True, index
                continue
            out, slots = result.tokens, index[result.slots]
            keep[piece.sample, slots] = True
            merge_map[piece.sample, index] = torch.where(out.merge_map < 0, -1, slots[out.merge_map.clamp_min(0)])
            if len(result.rewritten):
                features.append(out.features[result.rewritten])
                column = _columns(piece, prefill)[result.slots[result.rewritten]]
                columns.append(piece.sample * hidden.shape[1] + column)
            image = images[piece.sample][piece.number]
            images[piece.sample][piece.number] = _replaced(image, piece.members[result.slots.cpu()], out.origins)
        if features:
            visible = self._visible(torch.cat(features)).to(hidden)
            hidden = hidden.flatten(0, 1).index_put((torch.cat(columns),), visible).view_as(hidden)
        counts, asked = _counts(record.images, pieces, compressed)
        record.images = tuple(map(tuple, images))
        prefill.state, remaining = drop(prefill.state, keep, counts)
        newlines = prefill.state.newlines
        record.compressed = CompressedRecord(
            self._bound.name, keep, merge_map, counts, asked, () if newlines is None else newlines.counts
        )
        return hidden, remaining

    # Which patches, and how many tokens

    def _sources(self, prefill: Prefill) -> list[list[_Source]]:
        """The images of each sample with their patches and what was read of them.

        Raises:
            InputError: the tower did not encode these images while it was read.
        """
        matched, totals = match_images(self._backbone, prefill.record.images, prefill.modalities, prefill.encoded)
        for modality, patches in totals.items():
            reading = self._readings.get(modality)
            if reading is not None and patches != sum(reading.inputs):
                raise InputError(
                    f"compressor: the prompts' images have {patches} patches, the tower gave {sum(reading.inputs)}: "
                    "the features were computed for other prompts, or while the pipeline was not attached; pass pixels"
                )
        sources = [[_Source(**vars(one), reading=self._reading_of(one)) for one in row] for row in matched]
        if self._signals and any(source.reading is None for row in sources for source in row):
            raise InputError(
                "compressor: the tower was not seen at work on these images, so its signals are not known; pass "
                "pixels and let the model encode them while the pipeline is attached"
            )
        return sources

    def _reading_of(self, image: EncodedImage) -> Reading | None:
        return None if image.modality is None else self._readings.get(image.modality)

    def _shares(self, row: Sequence[_Source]) -> list[list[tuple[torch.Tensor, int | None]]]:
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


def _columns(piece: _Piece, prefill: Prefill) -> torch.Tensor:
    """Where the tokens of a piece stand in the sequence."""
    visual_index = prefill.state.visual_index
    return visual_index[piece.sample, (piece.first + piece.members).to(visual_index.device)]


def _slots(out: VisualTokens, tokens: int) -> tuple[torch.Tensor, bool]:
    """Which tokens of a piece make room for those that are left, and whether any stands elsewhere than its own.

    Each has its own; a class token takes a free one, and others make way for it.
    """
    if not out.tokens or int(out.origins.kind[0]) != CLS:
        return out.token_index, False
    own = out.token_index.cpu()[1:]
    free = torch.ones(tokens, dtype=torch.int8).index_fill(0, own, 0).argmax()
    slots = torch.cat([own, free[None]]).sort().values
    return slots.to(out.token_index.device), not torch.equal(slots[1:], own)


def _counts(
    images: Images, pieces: Sequence[_Piece], compressed: Sequence[_Compressed | None]
) -> tuple[Counts, tuple[tuple[int | None, ...], ...]]:
    """For each image the tokens that are left, and the number asked for (None where the compressor decides)."""
    kept = [[0] * len(row) for row in images]
    asked: list[list[list[int | None]]] = [[[] for _ in row] for row in images]
    for piece, result in zip(pieces, compressed, strict=True):
        whole = len(piece.members) if piece.stays_whole else 0
        kept[piece.sample][piece.number] += whole if result is None else result.tokens.tokens
        asked[piece.sample][piece.number].append(piece.k)
    return tuple(map(tuple, kept)), tuple(tuple(_sum(counts) for counts in row) for row in asked)


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
    merge_map = record.merge_map.to(features.device)
    batch, most, width = features.shape
    index = torch.where(merge_map < 0, most, merge_map)[..., None].expand(-1, -1, width)
    total = features.new_zeros(batch, most + 1, width, dtype=torch.float32).scatter_add(1, index, features.float())
    count = features.new_zeros(batch, most + 1, 1, dtype=torch.float32).scatter_add(
        1, index[..., :1], torch.ones_like(features[..., :1], dtype=torch.float32)
    )
    mean = (total / count.clamp_min(1))[:, :most]
    return torch.where(record.kept.to(features.device)[..., None], mean.to(features.dtype), features)
