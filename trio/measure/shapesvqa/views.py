"""Scenes on canvases of many sizes, and parts of them as scenes of their own.

A model that cuts an image into tiles sees the whole image small and squeezed, and its parts large. What is where in
such a view follows from the scene's map, so that dense labels and exercises exist for every view.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .scenes import Item, Scene, Split, draw_scene

GRIDS = ((3, 3), (4, 2), (4, 2), (2, 4), (2, 4), (4, 3), (3, 4), (4, 4), (5, 2), (2, 5))
"""Columns and rows of cells; nothing smaller than eight cells, which is as much as a scene may need."""
LARGEST = 336
"""Longest side of a canvas in pixels."""


@dataclass(frozen=True)
class Canvas:
    """Size of an image.

    Attributes:
        size: Width and height in pixels.
        cell: Size of a grid cell of the scene in pixels.
    """

    size: tuple[int, int]
    cell: int


def draw_canvas(rng: random.Random, largest: int = LARGEST, smallest_cell: int = 48) -> Canvas:
    """A size with an aspect ratio between 2:5 and 5:2; cells never overlap, as ``draw_scene`` needs."""
    cols, rows = rng.choice(GRIDS)
    cell = rng.randint(smallest_cell, largest // max(cols, rows))
    width, height = (min(largest, n * cell + rng.randint(0, cell // 4)) for n in (cols, rows))
    return Canvas((width, height), cell)


def canvas_of(split: Split, seed: int, group: int) -> Canvas:
    """The canvas of a group of scenes: the same on every machine."""
    return draw_canvas(random.Random(f"trio-canvas/1/{split}/{seed}/{group}"))


def varied_scene(split: Split, seed: int, index: int, group: int | None = None) -> Scene:
    """A scene on a canvas of its own, or on that of its group."""
    canvas = canvas_of(split, seed, index if group is None else group)
    return draw_scene(split, seed, index, canvas.size, canvas.cell)


def view(scene: Scene, box: tuple[float, float, float, float], size: tuple[int, int]) -> Scene:
    """A rectangle of a scene, scaled to ``size``; what lies outside the image is black.

    Args:
        scene: The scene.
        box: Left, top, right, bottom in pixels of the scene; may reach beyond it.
        size: Width and height of the view in pixels.
    """
    left, top, right, bottom = box
    width, height = size
    crop = scene.image.crop((round(left), round(top), round(right), round(bottom)))
    image = crop.resize(size, Image.Resampling.BICUBIC)
    xs = np.floor(left + (np.arange(width) + 0.5) * (right - left) / width).astype(int)
    ys = np.floor(top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(int)
    inside = ((ys >= 0) & (ys < scene.image.height))[:, None] & ((xs >= 0) & (xs < scene.image.width))
    rows, cols = ys.clip(0, scene.image.height - 1), xs.clip(0, scene.image.width - 1)
    item_map = np.where(inside, scene.item_map[rows[:, None], cols], 0).astype(np.uint8)
    glyph_map = np.where(inside, scene.glyph_map[rows[:, None], cols], 0).astype(np.uint8)

    seen = [i for i in range(len(scene.items)) if (item_map == i + 1).any()]
    number = np.zeros(len(scene.items) + 1, np.uint8)
    number[[i + 1 for i in seen]] = np.arange(1, len(seen) + 1)
    items = tuple(_moved(scene.items[i], item_map == i + 1) for i in seen)
    return Scene(scene.split, scene.index, image, items, scene.grid, number[item_map], glyph_map)


def _moved(item: Item, where: np.ndarray) -> Item:
    ys, xs = np.nonzero(where)
    return replace(item, box=(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))


def whole(scene: Scene, size: tuple[int, int]) -> Scene:
    """The whole image, squeezed into ``size``."""
    return view(scene, (0, 0, *scene.image.size), size)


def tile(scene: Scene, side: int, grid: tuple[int, int], row: int, col: int) -> Scene:
    """A tile of an image as LLaVA-NeXT's processor cuts it: scaled to fit, centred on black.

    Args:
        scene: The scene.
        side: Width and height of a tile in pixels.
        grid: Rows and columns of tiles.
        row: Row of the tile.
        col: Column of the tile.
    """
    rows, cols = grid
    width, height = scene.image.size
    scale = min(cols * side / width, rows * side / height)
    x0, y0 = (cols * side - width * scale) / 2, (rows * side - height * scale) / 2
    left, top = (col * side - x0) / scale, (row * side - y0) / scale
    return view(scene, (left, top, left + side / scale, top + side / scale), (side, side))
