"""The grid on which patches stand: windows of it, and cells of equal numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ...core.tokens import ImageTokens

T = TypeVar("T")


def windows(origins: ImageTokens, size: int) -> tuple[torch.Tensor, int]:
    """The square window in which each token stands.

    Windows start at the top left of the tokens; what is left over at the bottom and at the right joins the last window
    there, and a side shorter than a window is one window. Frames have windows of their own.

    Args:
        origins: of n tokens, no class token among them.
        size: rows and columns of a window.

    Returns:
        int64 ``(n,)`` on the CPU, numbered frame by frame and row by row, and how many windows there are.
    """
    (row, down), (column, across) = _side(origins.row, size), _side(origins.column, size)
    frames, frame = torch.unique(origins.frame, return_inverse=True)
    return (frame * down + row) * across + column, len(frames) * down * across


def windows_of(origins: Sequence[ImageTokens], size: int) -> tuple[torch.Tensor, list[int]]:
    """See `windows`: int64 ``(G, N)`` on the CPU, padded at the end, and how many windows each input has."""
    found = _each(origins, [size] * len(origins), windows)
    return pad_sequence([window for window, _ in found], batch_first=True), [count for _, count in found]


def cells_of(origins: Sequence[ImageTokens], k: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """See `cells`: int64 ``(G, K)``, padded with 0, and int64 ``(G, N)``, padded with -1; both on the CPU."""
    found = _each(origins, k, cells)
    middles = pad_sequence([middle for middle, _ in found], batch_first=True)
    return middles, pad_sequence([cell for _, cell in found], batch_first=True, padding_value=-1)


def _each(origins: Sequence[ImageTokens], sizes: Sequence[int], function: Callable[[ImageTokens, int], T]) -> list[T]:
    """What a function gives for each input; once for inputs on equal grids, as most tiles are."""
    made: dict[tuple[int, bytes], T] = {}
    results = []
    for own, size in zip(origins, sizes, strict=True):
        alone = int(own.frame.min()) == int(own.frame.max())  # several frames count as one tall image
        row = own.row - own.row.min() if alone else own.row
        axes = torch.stack([own.frame, row, own.column - own.column.min()])
        key = (size, axes.numpy().tobytes())
        if key not in made:
            made[key] = function(own, size)
        results.append(made[key])
    return results


def _side(axis: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    axis = axis - axis.min()
    count = max(1, (int(axis.max()) + 1) // size)
    return (axis // size).clamp_max(count - 1), count


def cells(origins: ImageTokens, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides n tokens into exactly k cells, near-squares of near-equal numbers of tokens.

    The rows are cut into about ``sqrt(k * rows / columns)`` bands of equal height, each band, column by column, into
    its part of the k cells. Where k cells fit the grid (24 x 24 into 12 x 12) they are rectangles, as in average
    pooling. Frames count as one tall image.

    Args:
        origins: of n tokens in raster order, no class token among them; tokens may be missing on the grid.
        k: from 1 to n.

    Returns:
        int64 ``(k,)``, rising: the token nearest to the middle of each cell (ties: the first); int64 ``(n,)``, the cell
        of each token. Both on the CPU.
    """
    tall = origins.frame * (int(origins.row.max()) + 1) + origins.row
    _, row = torch.unique(tall, return_inverse=True)
    column, n, rows = origins.column, len(row), int(row.max()) + 1
    bands = min(rows, k, max(1, int((k * rows * rows / n) ** 0.5 + 0.5)))
    band = (row * bands) // rows
    tokens = torch.bincount(band, minlength=bands)
    # One cell for each band, the others in proportion to the tokens: never more cells in a band than tokens.
    ends = (k - bands) * (tokens - 1).cumsum(0) // max(1, n - bands)
    count = 1 + ends.diff(prepend=ends.new_zeros(1))
    by_band = _sorted_by(band, column, row)
    position = torch.arange(n) - (tokens.cumsum(0) - tokens)[band[by_band]]
    first = (count.cumsum(0) - count)[band]
    into = torch.empty_like(row)
    into[by_band] = first[by_band] + position * count[band[by_band]] // tokens[band[by_band]]
    leaders = _middles(tall, column, into, k)
    order = leaders.argsort()
    return leaders[order], order.argsort()[into]


def _middles(row: torch.Tensor, column: torch.Tensor, into: torch.Tensor, k: int) -> torch.Tensor:
    """The token of each cell that is nearest to the mean of its rows and columns."""
    count = torch.bincount(into, minlength=k)
    away = torch.zeros(len(into), dtype=torch.float64)
    for axis in (row.double(), column.double()):
        middle = torch.bincount(into, weights=axis, minlength=k) / count
        away += (axis - middle[into]) ** 2
    return _sorted_by(into, (away * 2**20).round().long())[count.cumsum(0) - count]


def _sorted_by(*keys: torch.Tensor) -> torch.Tensor:
    """The order of tokens by the first key, within it by the second and so on, then by index."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].sort(stable=True).indices]
    return order
