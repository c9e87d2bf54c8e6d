"""Where visual tokens come from: the part of the image that each one stands for, carried beside the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["patch", "cls", "merged", "newline"]
KINDS: tuple[Kind, ...] = ("patch", "cls", "merged", "newline")
PATCH, CLS, MERGED, NEWLINE = range(len(KINDS))


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image (or of one video) in the order in which the sequence holds them.

    All tensors are int64 on the CPU with shape ``(n,)``.

    Attributes:
        kind: index into `KINDS`.
        frame: frame of a video; for a tiled image 0 is the whole image and 1 the tiles put together.
        row: row on the frame's grid of visual tokens, counted from the top of the image.
        column: column on that grid, counted from the left.
        size: how many patches of the vision tower the token stands for (at least 1; 0 for structure such as newlines).
        grids: rows and columns of each frame's grid; the last one holds for all later frames. Each grid covers the
            whole image, so that row and column give a token's position in it.
        placed: False where they do not: where the tokens lie on the image is not known.
    """

    kind: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    size: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    placed: bool = True

    @classmethod
    def from_grid(
        cls, rows: int, columns: int, *, frames: int = 1, size: int = 1, leading_cls: bool = False
    ) -> ImageTokens:
        """Tokens in raster order, frame by frame; with `leading_cls` one class token before them."""
        frame, row, column = (
            axis.reshape(-1)
            for axis in torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        kind = torch.full_like(row, PATCH)
        sizes = torch.full_like(row, size)
        if leading_cls:
            zero = torch.zeros(1, dtype=torch.int64)
            kind = torch.cat([torch.full_like(zero, CLS), kind])
            frame, row, column = (torch.cat([zero, axis]) for axis in (frame, row, column))
            sizes = torch.cat([torch.ones_like(zero), sizes])
        return cls(kind, frame, row, column, sizes, ((rows, columns),))

    @classmethod
    def join(cls, parts: Sequence[ImageTokens]) -> ImageTokens:
        """Several frames in a row, numbered from 0: what the parts call frames is counted on."""
        frames, first = [], 0
        for part in parts:
            frames.append(part.frame + first)
            first += len(part.grids)
        return cls(
            torch.cat([part.kind for part in parts]),
            torch.cat(frames),
            torch.cat([part.row for part in parts]),
            torch.cat([part.column for part in parts]),
            torch.cat([part.size for part in parts]),
            tuple(grid for part in parts for grid in part.grids),
            all(part.placed for part in parts),
        )

    def with_newlines(self) -> ImageTokens:
        """The tokens of one grid with a newline at the end of each row, as LLaVA-NeXT packs its tiles."""
        rows, columns = self.grids[0]
        ends = torch.arange(rows)
        order = torch.cat([self.row * (columns + 1) + self.column, ends * (columns + 1) + columns]).argsort()
        zero = torch.zeros_like(ends)
        return ImageTokens(
            torch.cat([self.kind, zero + NEWLINE])[order],
            torch.cat([self.frame, zero])[order],
            torch.cat([self.row, ends])[order],
            torch.cat([self.column, zero + columns])[order],
            torch.cat([self.size, zero])[order],
            self.grids,
        )

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns where all frames have one grid, else None."""
        return self.grids[0] if len(set(self.grids)) == 1 else None

    @property
    def is_visual(self) -> torch.Tensor:
        """bool ``(n,)``, False at structure such as newlines."""
        return self.kind != NEWLINE

    @property
    def grid_positions(self) -> torch.Tensor:
        """float32 ``(n, 2)``: row and column of each token's middle as shares of the image's height and width.

        nan where it has no position on the image (a class token, a newline) or where that is not known.
        """
        rows, columns = torch.tensor(self.grids)[self.frame.clamp_max(len(self.grids) - 1)].T
        shares = torch.stack([(self.row + 0.5) / rows, (self.column + 0.5) / columns], 1)
        known = (self.kind == PATCH) | (self.kind == MERGED)
        return shares.masked_fill(~known[:, None] | (not self.placed), float("nan"))

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        return int(self.row.shape[0])

    def select(self, indices: torch.Tensor) -> ImageTokens:
        """The same record for some of the tokens, in the order of `indices` (int64, shape ``(k,)``)."""
        return ImageTokens(
            self.kind[indices],
            self.frame[indices],
            self.row[indices],
            self.column[indices],
            self.size[indices],
            self.grids,
            self.placed,
        )


SignalKind = Literal["attention", "keys", "hidden", "cls", "groups"]


@dataclass(frozen=True)
class Signal:
    """Something to read off a vision tower while it runs.

    Attributes:
        kind: what is read, for each patch:

            - ``attention``: float32 ``(n,)``, mean over heads of the class token's attention row; in towers without a
              class token the attention that the patch receives, mean over heads and queries.
            - ``keys``: float32 ``(n, heads, head_dim)``, as they enter the attention (before any rotation).
            - ``hidden``: ``(n, D)``, the output of a block.
            - ``cls``: ``(D,)``, the class token in the output of a block, once for each input of the tower.
            - ``groups``: int64 ``(n,)``, the first patch of the group that the patch was merged into, counted within
              its input. Reading it makes the tower merge in all blocks up to this one (`trio.encoders.reading.inside`).
        layer: the block, counted from 0, or from the end where negative: -1 is the last. Attention and keys of a tower
            with windowed blocks are those of the next block that sees the whole image.
        merges: for ``groups``, tokens merged in each block; None: what leaves the number that the reader is told.
        heads: ``one`` reads attention as though it had a single head of full width (LLaVA-PruMerge's released code).
    """

    kind: SignalKind
    layer: int
    heads: Literal["mean", "one"] = "mean"
    merges: int | None = None


def seats(index: torch.Tensor, kind: torch.Tensor, size: int) -> torch.Tensor:
    """Which tokens of an input make room for those that are left of it: each its own place, in rising order.

    A class token that was kept has no place: it takes a free one, and others make way, so that it comes first.

    Args:
        index: int64 ``(m,)``, as `VisualTokens.token_index`.
        kind: of the m tokens.
        size: tokens of the input.
    """
    if not len(index) or int(kind[0]) != CLS:
        return index
    free = index.new_ones(size, dtype=torch.int8).index_fill(0, index[1:], 0).argmax()
    return torch.cat([index[1:], free[None]]).sort().values


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one input of the vision tower: an image, a tile of one, or a frame of a video.

    n tokens now, s tokens at the start (before any compressor).

    Attributes:
        features: ``(n, D)``, in the space that the compressor asks for (`Compressor.space`).
        origins: of the n tokens; row and column may start anywhere (a tile's are those of the whole image).
        sizes: float32 ``(n,)``, how many tokens of the start each one stands for.
        token_index: int64 ``(n,)``, for each token the one of the s that it stands in for, all different; -1 for the
            class token, which stands for none. A ``patch`` has the features that it started with (but see
            `Compressor.rewrites`).
        merge_map: int64 ``(s,)``, for each token of the start the one of the n that it went into, -1 where it was
            dropped.
        signals: what `Compressor.reads` asks for, first dimension n (but ``cls``: ``(D,)``).
        cls: ``(D,)``, the class token in the space of `features`; None where the tower has none, or nobody asked.
        seed: a number made from the prompt and the input's place in it (by `trio.encoders.compress`: from the pixels),
            the same in any batch.
    """

    features: torch.Tensor
    origins: ImageTokens
    sizes: torch.Tensor
    token_index: torch.Tensor
    merge_map: torch.Tensor
    signals: Mapping[Signal, torch.Tensor] = field(default_factory=dict)
    cls: torch.Tensor | None = None
    seed: int = 0

    @classmethod
    def start(
        cls,
        features: torch.Tensor,
        origins: ImageTokens,
        signals: Mapping[Signal, torch.Tensor] | None = None,
        *,
        class_token: torch.Tensor | None = None,
        seed: int = 0,
    ) -> VisualTokens:
        """Tokens of which none has been dropped or merged."""
        n, device = features.shape[0], features.device
        every = torch.arange(n, device=device)
        ones = torch.ones(n, dtype=torch.float32, device=device)
        return cls(features, origins, ones, every, every, dict(signals or {}), class_token, seed)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.features.shape[0])
