"""Where visual tokens come from: the picture that each one stands for, carried beside the tokens."""

from __future__ import annotations

from dataclasses import dataclass
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
        frame: frame of a video, 0 for a picture.
        row: row on the grid of visual tokens, counted from the top of the picture.
        column: column on that grid, counted from the left.
        size: how many patches of the vision tower the token stands for (at least 1; 0 for structure such as newlines).
        grid: rows and columns of the grid that `row` and `column` index.
    """

    kind: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    size: torch.Tensor
    grid: tuple[int, int]

    @classmethod
    def from_grid(cls, rows: int, columns: int, *, frames: int = 1, size: int = 1, leading_cls: bool = False) -> ImageTokens:
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
        return cls(kind, frame, row, column, sizes, (rows, columns))

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
            self.grid,
        )
