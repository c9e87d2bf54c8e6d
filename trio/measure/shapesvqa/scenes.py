"""Drawn scenes: coloured shapes and written numbers on textured backgrounds.

A scene is a function of (split, seed, index) alone, so that any machine redraws the same image. It carries what a
photograph does not: a map of the objects, from which the dense labels for training and the boxes for an oracle come.

The objects lie in the cells of a jittered grid. They never overlap, they cover about a third of the image or more (so
that no scorer can win by finding "the foreground" without reading the question), and corners occur often enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..fonts import drawing_font

Split = Literal["train", "validation", "test", "novel"]
"""``novel`` draws from what training never saw: held-out colour-shape pairs, textures and slanted digits."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (246, 138, 24),
    "yellow": (248, 226, 52),
    "green": (36, 158, 52),
    "cyan": (52, 208, 214),
    "blue": (34, 66, 222),
    "purple": (138, 40, 172),
    "pink": (255, 150, 196),
}
PLATES: dict[str, tuple[int, int, int]] = {"black": (14, 14, 14), "white": (244, 244, 244)}
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("yellow", "cross"),
        ("blue", "triangle"),
        ("green", "diamond"),
        ("pink", "square"),
        ("cyan", "circle"),
    }
)
"""Pairs of colour and shape that occur in the split ``novel`` only, and that no training question mentions."""

IntMap = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Item:
    """One thing in the image.

    Attributes:
        shape: One of ``SHAPES``, or ``plate`` for the plate that a number is written on.
        colour: One of ``COLOURS``, or one of ``PLATES`` for a plate.
        box: Left, top, right and bottom in pixels (the last two exclusive).
        cell: Row and column of the grid cell that the thing lies in.
        number: The two-digit number on a plate.
    """

    shape: str
    colour: str
    box: Box
    cell: tuple[int, int]
    number: int | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, x and y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """An image and what is in it.

    Attributes:
        split: The split that the scene belongs to.
        index: Its number in the split.
        image: The RGB image.
        items: The things in it.
        grid: Rows and columns of cells.
        item_map: (height, width), 0 for background, i + 1 where ``items[i]`` is.
        glyph_map: (height, width), 0 for none, 1 + d in the cell of a tens digit d, 11 + d in that of a ones digit.
    """

    split: Split
    index: int
    image: Image.Image = field(repr=False)
    items: tuple[Item, ...]
    grid: tuple[int, int]
    item_map: IntMap = field(repr=False)
    glyph_map: IntMap = field(repr=False)

    @property
    def shapes(self) -> list[int]:
        """Indices of the items that are shapes."""
        return [i for i, item in enumerate(self.items) if item.shape != "plate"]

    @property
    def plates(self) -> list[int]:
        """Indices of the items that are number plates."""
        return [i for i, item in enumerate(self.items) if item.shape == "plate"]

    def corner(self, index: int) -> str | None:
        """The corner that an item lies in ("top left"), or None."""
        (row, col), (rows, cols) = self.items[index].cell, self.grid
        if row not in (0, rows - 1) or col not in (0, cols - 1):
            return None
        return f"{'top' if row == 0 else 'bottom'} {'left' if col == 0 else 'right'}"

    def coverage(self, patch: int = 14) -> NDArray[np.float32]:
        """Share of each patch that each item covers: (items, rows, columns)."""
        height, width = self.item_map.shape
        rows, cols = height // patch, width // patch
        ids = np.arange(1, len(self.items) + 1, dtype=np.uint8)
        hits = self.item_map[None, : rows * patch, : cols * patch] == ids[:, None, None]
        shares: NDArray[np.float32] = hits.reshape(len(ids), rows, patch, cols, patch).mean((2, 4), dtype=np.float32)
        return shares


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners in the square from -1 to 1, y downwards."""
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -0.98), (0.98, 0.86), (-0.98, 0.86)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "cross":
        a = 0.36
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if shape == "star":
        radii = (1.0, 0.46)
        turn = [math.pi * (k / 5 - 0.5) for k in range(10)]
        return [(radii[k % 2] * math.cos(t), radii[k % 2] * math.sin(t)) for k, t in enumerate(turn)]
    raise ValueError(f"unknown shape {shape!r}")


def _shape_mask(shape: str, radius: int, turn: float) -> Image.Image:
    """An anti-aliased mask, drawn four times too large and shrunk."""
    side, scale = 2 * radius, 4
    mask = Image.new("L", (side * scale, side * scale), 0)
    draw, r = ImageDraw.Draw(mask), radius * scale
    if shape == "circle":
        draw.ellipse((0.06 * r, 0.06 * r, 1.94 * r, 1.94 * r), fill=255)
    else:
        c, s = math.cos(turn), math.sin(turn)
        draw.polygon(
            [(r + r * 0.97 * (c * x - s * y), r + r * 0.97 * (s * x + c * y)) for x, y in _polygon(shape)], fill=255
        )
    return mask.reduce(scale)


def _background(rng: random.Random, size: tuple[int, int], novel: bool) -> Image.Image:
    """Smooth coloured noise in two octaves; stripes of it in the split ``novel``."""

    def noise(cols: int, rows: int) -> Image.Image:
        return Image.frombytes("RGB", (cols, rows), rng.randbytes(3 * cols * rows)).resize(
            size, Image.Resampling.BICUBIC
        )

    grey = Image.new("RGB", size, (rng.randint(70, 170),) * 3)
    coarse, fine = rng.randint(3, 8), rng.randint(14, 36)
    if novel:
        texture = noise(rng.randint(12, 24), 1) if rng.random() < 0.5 else noise(1, rng.randint(12, 24))
    else:
        texture = noise(coarse, coarse)
    texture = Image.blend(grey, texture, rng.uniform(0.25, 0.55))
    return Image.blend(texture, noise(fine, fine), rng.uniform(0.04, 0.16))


def _jitter(rng: random.Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-10, 10))) for c in colour)
    return r, g, b


def _attributes(rng: random.Random, count: int, novel: bool) -> list[tuple[str, str]]:
    """Colours and shapes. Two scenes in three repeat a colour or a shape, so that counts above one are common."""
    allowed = [(c, s) for c in COLOURS for s in SHAPES if novel or (c, s) not in HELD_OUT]
    drawn = [rng.choice(allowed) for _ in range(count)]
    if novel and count:
        drawn[0] = rng.choice(sorted(HELD_OUT))
    kind, copies = rng.random(), rng.randint(2, 3)
    if kind < 0.67 and count:
        repeat_shape = kind < 0.34
        colour, shape = drawn[0]
        same = [(c, s) for c, s in allowed if (s == shape if repeat_shape else c == colour)]
        drawn[1:copies] = rng.sample(same, copies)[: len(drawn[1:copies])]
    rng.shuffle(drawn)
    return drawn


def _put(
    rng: random.Random,
    image: Image.Image,
    item_map: NDArray[np.uint8],
    mask: Image.Image,
    place: tuple[int, int],
    colour: str,
    number: int,
) -> Box:
    """Puts a shape into an image and the map of its objects; returns its box."""
    x, y = place
    image.paste(_jitter(rng, COLOURS[colour]), place, mask)
    solid = np.asarray(mask) > 127
    item_map[y : y + mask.height, x : x + mask.width][solid] = number
    ys, xs = np.nonzero(solid)
    return x + int(xs.min()), y + int(ys.min()), x + int(xs.max()) + 1, y + int(ys.max()) + 1


def draw_scene(split: Split, seed: int, index: int, size: tuple[int, int] = (168, 168), cell: int = 56) -> Scene:
    """Draw a scene.

    Args:
        split: Which split; also the source of randomness, so that splits never share scenes.
        seed: A seed for a fresh set of scenes.
        index: Number of the scene.
        size: Width and height in pixels.
        cell: Rough size of a grid cell; every length in the image scales with it.
    """
    rng = random.Random(f"trio-scenes/1/{split}/{seed}/{index}")
    novel = split == "novel"
    width, height = size
    cols, rows = max(1, round(width / cell)), max(1, round(height / cell))
    image = _background(rng, size, novel)
    item_map, glyph_map = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)

    cells = [(r, c) for r in range(rows) for c in range(cols)]
    rng.shuffle(cells)
    room = len(cells)
    plates = min(rng.choice((0, 1, 1, 2)), max(0, room - 1))
    count = min(rng.randint(5, 6) if plates else 6, room - plates)
    low = 0.40 if plates + count < 7 else 0.35  # fewer things are drawn larger, so that the foreground stays as large
    items: list[Item] = []

    def place(box_w: int, box_h: int) -> tuple[int, int, tuple[int, int]]:
        row, col = cells.pop()
        x0, x1 = col * width / cols, (col + 1) * width / cols - box_w
        y0, y1 = row * height / rows, (row + 1) * height / rows - box_h
        x, y = round(rng.uniform(x0, max(x0, x1))), round(rng.uniform(y0, max(y0, y1)))
        return min(max(x, 0), width - box_w), min(max(y, 0), height - box_h), (row, col)

    for colour in rng.sample(sorted(PLATES), plates):
        number, font_size = rng.randint(10, 99), round(cell * rng.uniform(0.46, 0.58))
        slant = rng.choice((-0.25, 0.25)) if novel else 0.0
        advance, glyph_h = round(font_size * 0.60), round(font_size * 0.74)
        pad = round(cell * 0.08)
        box_w, box_h = 2 * advance + 2 * pad, glyph_h + 2 * pad
        x, y, where = place(box_w, box_h)
        ink = 255 if colour == "black" else 0
        text = Image.new("L", (box_w, box_h), 0)
        draw, bold = ImageDraw.Draw(text), rng.random() < 0.5
        for k, digit in enumerate(str(number)):
            draw.text(
                (pad + advance * (k + 0.5), box_h / 2),
                digit,
                fill=255,
                font=drawing_font(font_size),
                anchor="mm",
                stroke_width=int(bold) * cell / 112,
            )
            left, right = x + pad + k * advance, x + pad + (k + 1) * advance
            glyph_map[y + pad : y + box_h - pad, left:right] = 1 + 10 * k + int(digit)
        if slant:
            text = text.transform(
                text.size, Image.Transform.AFFINE, (1, slant, -slant * box_h / 2, 0, 1, 0), Image.Resampling.BILINEAR
            )
        image.paste(_jitter(rng, PLATES[colour]), (x, y, x + box_w, y + box_h))
        image.paste((ink,) * 3, (x, y), text)
        item_map[y : y + box_h, x : x + box_w] = len(items) + 1
        items.append(Item("plate", colour, (x, y, x + box_w, y + box_h), where, number))

    for colour, shape in _attributes(rng, count, novel):
        radius = round(cell * rng.uniform(low, 0.49))
        mask = _shape_mask(shape, radius, rng.uniform(-0.2, 0.2))
        x, y, where = place(2 * radius, 2 * radius)
        box = _put(rng, image, item_map, mask, (x, y), colour, len(items) + 1)
        items.append(Item(shape, colour, box, where))
    return Scene(split, index, image, tuple(items), (rows, cols), item_map, glyph_map)


def draw_things(
    rng: random.Random,
    things: Sequence[tuple[str, str]],
    split: Split,
    index: int,
    size: tuple[int, int] = (168, 168),
    cell: int = 56,
) -> Scene:
    """Draw a scene with given shapes and no plates, each in a cell of its own.

    Args:
        rng: Source of everything that is not given.
        things: Colour and shape of each, at most as many as there are cells.
        split: What the scene says it belongs to; ``novel`` has other backgrounds.
        index: What the scene says its number is.
        size: Width and height in pixels.
        cell: Rough size of a grid cell.
    """
    width, height = size
    cols, rows = round(width / cell), round(height / cell)
    image = _background(rng, size, split == "novel")
    item_map = np.zeros((height, width), np.uint8)
    items: list[Item] = []
    cells = rng.sample([(row, col) for row in range(rows) for col in range(cols)], len(things))
    for (colour, shape), (row, col) in zip(things, cells, strict=True):
        radius = round(cell * rng.uniform(0.38, 0.48))
        side = 2 * radius
        x = round(rng.uniform(col * width / cols, (col + 1) * width / cols - side))
        y = round(rng.uniform(row * height / rows, (row + 1) * height / rows - side))
        mask = _shape_mask(shape, radius, rng.uniform(-0.2, 0.2))
        box = _put(rng, image, item_map, mask, (x, y), colour, len(items) + 1)
        items.append(Item(shape, colour, box, (row, col)))
    return Scene(split, index, image, tuple(items), (rows, cols), item_map, np.zeros_like(item_map))
