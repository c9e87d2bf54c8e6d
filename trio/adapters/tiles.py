"""Any-resolution images: the whole image, then its tiles put together, unpadded, rows ending with newlines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core.patches import PatchMap, join, tiled
from ..core.tokens import ImageTokens


def tiled_image(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]], *, tile: int, side: int, most_tiles: int | None = None
) -> ImageTokens:
    """The tokens of one image, as LLaVA-NeXT and OneVision pack them.

    Frame 0 is the whole image in ``side x side`` patches. Frame 1 is the grid of all tiles without what padding
    covers; each of its rows ends with a newline. Both grids cover the whole image.

    Args:
        size: height and width of the image in pixels.
        pinpoints: resolutions (height, width) that the tiles may make up.
        tile: pixels along a side of a tile.
        side: patches along a side of a tile.
        most_tiles: OneVision shrinks the grid so that it has about as many patches as this many tiles; None: never.
    """
    rows, columns = grid_of(size, pinpoints, tile=tile, side=side)
    if most_tiles is not None:
        ratio = math.sqrt(rows * columns / (most_tiles * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return ImageTokens.join([ImageTokens.from_grid(side, side), ImageTokens.from_grid(rows, columns).with_newlines()])


def grid_of(size: tuple[int, int], pinpoints: Sequence[Sequence[int]], *, tile: int, side: int) -> tuple[int, int]:
    """Rows and columns of patches of all tiles put together, without padding; arguments as for `tiled_image`."""
    height, width = best_resolution(size, pinpoints)
    return unpadded(height // tile * side, width // tile * side, size)


def tiled_patches(
    image: ImageTokens, size: tuple[int, int], pinpoints: Sequence[Sequence[int]], *, tile: int, side: int
) -> PatchMap:
    """The patches behind the tokens of a tiled image: the whole image first, then tile behind tile.

    A grid that OneVision has shrunk takes for each token the patch in its middle; all its tiles then count as one
    input, since tokens no longer end where tiles do.

    Args:
        image: its tokens without newlines, as `tiled_image` lays them out.
        size: height and width of the image in pixels.
        pinpoints: resolutions (height, width) that the tiles may make up.
        tile: pixels along a side of a tile.
        side: patches along a side of a tile.
    """
    height, width = best_resolution(size, pinpoints)
    tiles = (height // tile, width // tile)
    rows, columns = grid_of(size, pinpoints, tile=tile, side=side)
    top, left = (tiles[0] * side - rows) // 2, (tiles[1] * side - columns) // 2
    shown = image.grids[-1]
    row, column = image.row[image.frame == 1], image.column[image.frame == 1]
    shrunk = shown != (rows, columns)
    if shrunk:
        row = ((row + 0.5) * rows / shown[0]).long()
        column = ((column + 0.5) * columns / shown[1]).long()
    grid = tiled((row + top)[:, None], (column + left)[:, None], tiles=tiles, side=side)
    if shrunk:
        grid = PatchMap(grid.patches, torch.zeros_like(grid.tile), grid.total)
    return join([PatchMap.runs(side**2), grid])


def best_resolution(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution that keeps most of the image and, among those, wastes least (LLaVA-NeXT).

    Args:
        size: height and width of the image in pixels.
        pinpoints: the resolutions to choose from, height and width.
    """
    height, width = size

    def fit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        return useful, useful - resolution[0] * resolution[1]

    best = max(pinpoints, key=fit)
    return int(best[0]), int(best[1])


def unpadded(rows: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the grid without what the padding to the grid's aspect ratio covers.

    Args:
        rows: of the padded grid.
        columns: of the padded grid.
        size: height and width of the image in pixels.
    """
    height, width = size
    if width / height > columns / rows:
        kept = int(round(height * columns / width, 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * rows / height, 7))
    return rows, columns - 2 * ((columns - kept) // 2)
