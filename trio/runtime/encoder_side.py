"""A compressor at work: between the tower's signals and the first decoder layer.

Stock code encodes the images and puts a feature at every placeholder. What a compressor leaves is then written at the
columns of the tokens that it keeps, and the others are dropped in front of the first decoder layer, exactly as a stage
would: embeddings, masks, positions, caches and features that come later shrink by the same code, in every family.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import pad

from ..core.backbone import Backbone
from ..core.hooking import Owner
from ..core.token_batch import TokenBatch, batches, first
from ..core.tokens import PATCH, ImageTokens, Signal, seats
from ..core.transfer import HostValues, upload, upload_all
from ..errors import InputError, UnsupportedModelError
from .encoded import EncodedImage, match_images
from .forward import Prefill
from .record import CompressedRecord
from .state import Counts, Images

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
    """What a compressor left of some pieces, G of them.

    Attributes:
        pieces: their numbers among all.
        tokens: the tokens left.
        index: int64 ``(G, N)`` on the CPU, for each token of a piece its number among the sample's; what follows is
            padding.
        samples: int64 ``(G, 1)`` on the CPU, in the batch.
        columns: int64 ``(G, N)`` on the CPU, where each token of a piece stands among the ``B * S`` columns.
        slots: int64 ``(G, M)`` on the CPU, the tokens of the piece in whose columns they are written, in rising order;
            behind them N.
        went: int64 ``(G, N)`` on the CPU, `TokenBatch.merge_map`.
        rewritten: int64 on the CPU, those of the G x M whose features are not the ones that stand in their column
            already.
    """

    pieces: tuple[int, ...]
    tokens: TokenBatch
    index: torch.Tensor
    samples: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    went: torch.Tensor
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

    def looked(self, values: HostValues) -> None:
        """What the host knows of the forward: the reader need not look at it again."""
        if self._reader is not None:
            self._reader.looked(values)

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
        return self._write_back(prefill, hidden, pieces, self._compress(pieces, prefill, hidden))

    def _plan(self, prefill: Prefill) -> list[_Piece]:
        """The pieces of all images in order, with the number of tokens to leave of each."""
        pieces = []
        rows = self._sources(prefill)
        attention = self._attention(rows) if self._bound.split == "saliency" else {}
        for sample, row in enumerate(rows):
            start = 0
            for number, (source, parts) in enumerate(zip(row, self._shares(row, attention), strict=True)):
                pieces += [
                    _Piece(sample, number, tile, source, members, start, k) for tile, (members, k) in enumerate(parts)
                ]
                start += source.image.tokens
        return pieces

    def _compress(self, pieces: Sequence[_Piece], prefill: Prefill, hidden: torch.Tensor) -> list[_Compressed]:
        """Runs the compressor on all pieces that lose tokens: together where they come from one kind of encoding."""
        by_reading: dict[tuple[int, int], list[int]] = {}
        for at, piece in enumerate(pieces):
            if not piece.stays_whole and piece.k != 0:
                patches = piece.source.patches
                kind = (id(piece.source.reading), 0 if patches is None else patches.patches.shape[1])
                by_reading.setdefault(kind, []).append(at)
        compressed = []
        for group in by_reading.values():
            for members in batches([len(pieces[at].members) for at in group], hidden.shape[-1]):
                numbers = tuple(group[at] for at in members)
                compressed.append(self._compress_batch(numbers, [pieces[at] for at in numbers], prefill, hidden))
        return compressed

    def _compress_batch(
        self, numbers: tuple[int, ...], pieces: Sequence[_Piece], prefill: Prefill, hidden: torch.Tensor
    ) -> _Compressed:
        index = _padded([piece.first + piece.members for piece in pieces])
        samples = torch.tensor([piece.sample for piece in pieces])[:, None]
        known = prefill.host or prefill.state  # nothing is dropped yet, so that the host knows it
        columns = samples * hidden.shape[1] + known.visual_index[samples, index]
        features, signals, class_tokens = self._read(pieces, hidden.device)
        if features is None:
            features = hidden.flatten(0, 1)[upload(columns, hidden.device)]
        batch = TokenBatch.start(
            features,
            [piece.source.image.select(piece.members) for piece in pieces],
            signals,
            class_tokens=class_tokens,
            seeds=[
                zlib.crc32(f"{prefill.seeds[piece.sample]}/{piece.number}/{piece.tile}".encode()) for piece in pieces
            ],
        )
        sizes = [len(piece.members) for piece in pieces]
        k = [size if piece.k is None else piece.k for size, piece in zip(sizes, pieces, strict=True)]
        tokens = self._bound.compressor.compress_batch(batch, k)
        token_index, went = _on_host(tokens)
        slots, rewritten = _slots(tokens, token_index, sizes, self._bound.compressor.rewrites)
        return _Compressed(numbers, tokens, index, samples, columns, slots, went, rewritten)

    def _write_back(
        self, prefill: Prefill, hidden: torch.Tensor, pieces: Sequence[_Piece], compressed: Sequence[_Compressed]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts what is left into the hidden states, the prefill's state and its record; see `run`."""
        record, shape = prefill.record, prefill.state.token_index.shape
        kept, merge_map = _whole(pieces, shape)
        features: list[torch.Tensor] = []
        columns: list[torch.Tensor] = []
        for part in compressed:
            _mark(part, kept, merge_map, shape[1])
            if len(part.rewritten):
                own = part.columns.gather(1, part.slots.clamp_max(part.columns.shape[1] - 1)).flatten()[part.rewritten]
                rewritten, column = upload_all([part.rewritten, own], hidden.device)
                features.append(part.tokens.features.flatten(0, 1)[rewritten])
                columns.append(column)
        if features:
            visible = self._visible(torch.cat(features)).to(hidden)
            hidden = hidden.flatten(0, 1).index_put((torch.cat(columns),), visible).view_as(hidden)
        counts, asked = _counts(record.images, pieces, compressed)
        record.images = _written(record.images, pieces, compressed)
        keep = kept[:-1].view(shape)
        remaining = prefill.drop(keep, counts)
        newlines = prefill.state.newlines
        record.compressed = CompressedRecord(
            self._bound.name,
            keep,
            merge_map[:-1].view(shape),
            counts,
            asked,
            () if newlines is None else newlines.counts,
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

    def _attention(self, rows: Sequence[Sequence[_Source]]) -> dict[int, torch.Tensor]:
        """Of the images with tiles, by `id`: float32 on the CPU, the attention of each token of the whole image.

        All are looked at together: one wait for the device an encoding.
        """
        by_reading: dict[int, list[_Source]] = {}
        for source in (source for row in rows for source in row):
            if source.reading is not None and source.patches is not None and len(source.pieces()) > 2:
                by_reading.setdefault(id(source.reading), []).append(source)
        attention: dict[int, torch.Tensor] = {}
        for sources in by_reading.values():
            reading = sources[0].reading
            assert reading is not None  # looked at above
            values = reading.values[SPLIT_SIGNAL]
            index = [_patches(source, source.pieces()[0]) for source in sources]
            own = values[upload(torch.cat([one.flatten() for one in index]), values.device)].float().cpu()
            for source, one, part in zip(sources, index, torch.split(own, [one.numel() for one in index]), strict=True):
                attention[id(source)] = part.view(one.shape).mean(1)
        return attention

    def _shares(
        self, row: Sequence[_Source], attention: Mapping[int, torch.Tensor]
    ) -> list[list[tuple[torch.Tensor, int | None]]]:
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
                self._split(total, source, tiles, attention.get(id(source)))
                for source, tiles, total in zip(row, pieces, totals, strict=True)
            ]
        return [list(zip(image, ks, strict=True)) for image, ks in zip(pieces, counts, strict=True)]

    def _split(
        self, total: int | None, source: _Source, pieces: list[torch.Tensor], attention: torch.Tensor | None
    ) -> list[int | None]:
        """An image's number over its pieces."""
        if total is None:
            return [None] * len(pieces)
        sizes = [len(piece) for piece in pieces]
        return [*split(total, sizes, _weights(source.image, pieces, attention))]

    # Features

    def _read(
        self, pieces: Sequence[_Piece], device: torch.device
    ) -> tuple[torch.Tensor | None, dict[Signal, torch.Tensor], torch.Tensor | None]:
        """What was read of G pieces of one kind of encoding, padded to N tokens.

        A token has the mean over the patches that it stands for (groups: the first's).

        Returns:
            Features ``(G, N, D)`` where they are taken from the tower, the compressor's signals, and class tokens
            ``(G, D)`` where they are read.
        """
        if not self._signals:
            return None, {}, None
        reading = pieces[0].source.reading
        assert reading is not None  # checked in _sources
        host, number = _padded([_patches(piece.source, piece.members) for piece in pieces]), _inputs(pieces, reading)
        values_device = next(iter(reading.values.values())).device
        index, inputs = upload(host, values_device), upload(number, values_device)

        def read(signal: Signal) -> torch.Tensor:
            values: torch.Tensor = reading.values[signal]
            if signal.kind == "cls":
                return values[inputs.to(values.device)].to(device)
            own = index.to(values.device)
            whole = own.shape[2] > 1 and signal.kind != "groups"
            return (values[own].mean(2) if whole else values[own[..., 0]]).to(device)

        signals = {signal: read(signal) for signal in self._bound.compressor.reads() if signal.kind != "cls"}
        if not self._blocks:
            return None, signals, None
        features = torch.cat([read(Signal("hidden", block)) for block in self._blocks], -1)
        if Signal("cls", self._blocks[0]) not in self._signals:
            return features, signals, None
        return features, signals, torch.cat([read(Signal("cls", block)) for block in self._blocks], -1)

    def _visible(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the language model takes them."""
        return self._backbone.project(features) if self._blocks else features


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(G, n, ...)``, padded at the end with zeros, which are indices of something."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _patches(source: _Source, members: torch.Tensor) -> torch.Tensor:
    """int64 ``(n, p)`` on the CPU, for some tokens of an image their patches among those of the encoding."""
    assert source.patches is not None  # it has a reading
    return source.offset + source.patches.patches[members]


def _weights(image: ImageTokens, pieces: Sequence[torch.Tensor], attention: torch.Tensor | None) -> list[float]:
    """How a number is shared: by tokens, or the tiles' part of it by the attention to their places.

    Args:
        image: its tokens.
        pieces: of it, the whole image first.
        attention: of the tokens of the whole image; None: it plays no role.
    """
    sizes = [len(piece) for piece in pieces]
    if attention is None:
        return [float(size) for size in sizes]
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


def _inputs(pieces: Sequence[_Piece], reading: Reading) -> list[int]:
    """The input of the tower that each piece comes from."""
    ends = list(accumulate(reading.inputs))
    return [bisect_right(ends, int(_patches(piece.source, piece.members[:1])[0, 0])) for piece in pieces]


def _whole(pieces: Sequence[_Piece], shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """bool and int64 ``(B * N + 1,)`` on the CPU: tokens of pieces that stay whole are kept, and go into themselves.

    The place at the end is one for padding.
    """
    kept = torch.zeros(shape.numel() + 1, dtype=torch.bool)
    merge_map = torch.full_like(kept, -1, dtype=torch.int64)
    for piece in pieces:
        if piece.stays_whole:
            own = piece.first + piece.members
            kept[piece.sample * shape[1] + own] = True
            merge_map[piece.sample * shape[1] + own] = own
    return kept, merge_map


def _mark(part: _Compressed, kept: torch.Tensor, merge_map: torch.Tensor, most: int) -> None:
    """Enters what is left of some pieces.

    Args:
        part: the pieces.
        kept: bool ``(B * N + 1,)`` on the CPU.
        merge_map: int64 likewise.
        most: N.
    """
    tokens, nowhere = part.tokens, len(kept) - 1
    place, width = part.samples * most + part.index, part.index.shape[1]
    if min(tokens.starts) < width:
        place.masked_fill_(~first(tokens.starts, width, place.device), nowhere)
    kept.index_fill_(0, pad(place, (0, 1), value=nowhere).gather(1, part.slots).flatten(), True)
    target = pad(part.index, (0, 1)).gather(1, part.slots)
    went = torch.where(part.went < 0, -1, target.gather(1, part.went.clamp_min(0)))
    merge_map.scatter_(0, place.flatten(), went.flatten())


def _on_host(tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_index` and `merge_map` on the CPU; where the host does not know them the device is looked at once."""
    if tokens.host_index is not None and tokens.host_map is not None:
        return tokens.host_index, tokens.host_map
    both = torch.cat([tokens.token_index, tokens.merge_map], 1).cpu()
    return both[:, : tokens.token_index.shape[1]], both[:, tokens.token_index.shape[1] :]


def _slots(
    tokens: TokenBatch, index: torch.Tensor, sizes: Sequence[int], rewrites: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of each piece make room for those that are left, and which of these are written: see `_Compressed`.

    With `rewrites` all are written. Each token has its own place; a class token takes a free one, and others make way
    for it.
    """
    slots = torch.full_like(index, max(sizes))
    changed = torch.zeros_like(index, dtype=torch.bool)
    for g, count in enumerate(tokens.counts):
        kind = tokens.origins[g].kind
        own = seats(index[g, :count], kind, sizes[g])
        changed[g, :count] = (kind != PATCH) | rewrites
        if not torch.equal(own[1:], index[g, 1:count]):
            changed[g, :count] = True
        slots[g, :count] = own
    return slots, changed.flatten().nonzero().squeeze(1)


def _counts(
    images: Images, pieces: Sequence[_Piece], compressed: Sequence[_Compressed]
) -> tuple[Counts, tuple[tuple[int | None, ...], ...]]:
    """For each image the tokens that are left, and the number asked for (None where the compressor decides)."""
    counts = {at: count for part in compressed for at, count in zip(part.pieces, part.tokens.counts, strict=True)}
    left = [[0] * len(row) for row in images]
    asked: list[list[list[int | None]]] = [[[] for _ in row] for row in images]
    for at, piece in enumerate(pieces):
        whole = len(piece.members) if piece.stays_whole else 0
        left[piece.sample][piece.number] += counts.get(at, whole)
        asked[piece.sample][piece.number].append(piece.k)
    return tuple(map(tuple, left)), tuple(tuple(_sum(own) for own in row) for row in asked)


def _sum(counts: Sequence[int | None]) -> int | None:
    """A sum that is not known where a part is not."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _written(images: Images, pieces: Sequence[_Piece], compressed: Sequence[_Compressed]) -> Images:
    """The images with the origins of what is left in the places where it is written."""
    parts: dict[tuple[int, int], list[tuple[torch.Tensor, ImageTokens]]] = {}
    for part in compressed:
        for g, (at, count) in enumerate(zip(part.pieces, part.tokens.counts, strict=True)):
            piece = pieces[at]
            own = piece.members[part.slots[g, :count]], part.tokens.origins[g]
            parts.setdefault((piece.sample, piece.number), []).append(own)
    return tuple(
        tuple(_replaced(image, parts.get((sample, number), ())) for number, image in enumerate(row))
        for sample, row in enumerate(images)
    )


def _replaced(image: ImageTokens, parts: Sequence[tuple[torch.Tensor, ImageTokens]]) -> ImageTokens:
    """An image with some of its tokens' origins replaced: int64 indices of tokens, and what they become."""
    fields = {name: getattr(image, name).clone() for name in ("kind", "frame", "row", "column", "size") if parts}
    for name, values in fields.items():
        for slots, tokens in parts:
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
    merge_map, kept = upload_all([record.merge_map, record.kept], features.device)
    batch, most, width = features.shape
    index = torch.where(merge_map < 0, most, merge_map)[..., None].expand(-1, -1, width)
    total = features.new_zeros(batch, most + 1, width, dtype=torch.float32).scatter_add(1, index, features.float())
    count = features.new_zeros(batch, most + 1, 1, dtype=torch.float32).scatter_add(
        1, index[..., :1], torch.ones_like(features[..., :1], dtype=torch.float32)
    )
    mean = (total / count.clamp_min(1))[:, :most]
    return torch.where(kept[..., None], mean.to(features.dtype), features)
