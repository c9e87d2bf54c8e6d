"""A page that remembers what was drawn on it and where: places are points, boxes are pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..fonts import drawing_font

__all__ = ["A4", "Colour", "DocumentQuestion", "Mark", "Page"]

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
Point = tuple[float, float]

#: Width and height of a sheet in points (1/72 inch), upright.
A4 = (595.0, 842.0)
INK: Colour = (24, 24, 28)
GREY: Colour = (96, 96, 102)
RULE: Colour = (206, 206, 210)


@dataclass(frozen=True)
class Mark:
    """One thing on a page that a question can be about.

    Attributes:
        kind: a text, a box to tick, a bar or a point of a chart.
        text: what is written; empty for what is no text.
        box: left, top, right and bottom in pixels, the last two exclusive.
        pixels: size of the font; 0 for what is no text.
        colour: it is drawn in.
    """

    kind: Literal["text", "tick box", "bar", "point"]
    text: str
    box: Box
    pixels: int = 0
    colour: Colour = INK


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about a page.

    Attributes:
        kind: the sub-task.
        text: in words.
        answers: those that count as right; the first is what is drawn.
        about: numbers of the marks that one must see to know.
        numeric: whether answers are compared as numbers.
        tolerance: share of the number that an answer may be off.
        unit: a word that may stand behind the number.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    about: tuple[int, ...]
    numeric: bool = False
    tolerance: float = 0.0
    unit: str = ""


class Page:
    """A sheet of paper."""

    def __init__(self, size: tuple[float, float], dpi: int, paper: Colour = (255, 255, 255)) -> None:
        """Takes an empty sheet.

        Args:
            size: width and height in points.
            dpi: pixels an inch.
            paper: its colour.
        """
        self.size, self.dpi = size, dpi
        self.image = Image.new("RGB", (self.px(size[0]), self.px(size[1])), paper)
        self.marks: list[Mark] = []
        self._draw = ImageDraw.Draw(self.image)

    def px(self, points: float) -> int:
        """A length in pixels."""
        return round(points * self.dpi / 72)

    def text(
        self, place: Point, text: str, size: float = 9, *, anchor: str = "ls", colour: Colour = INK, bold: bool = False
    ) -> int:
        """Writes a line.

        Args:
            place: where its anchor lies, in points.
            text: ASCII.
            size: of the font, in points.
            anchor: as Pillow's: ``ls`` begins there on the baseline, ``rs`` ends there, ``ms`` has its middle there.
            colour: of the letters.
            bold: struck twice, a little apart (the font has one weight).

        Returns:
            Number of the mark.
        """
        pixels, (x, y) = max(1, self.px(size)), (self.px(place[0]), self.px(place[1]))
        font = drawing_font(pixels)
        shifts = (0, max(1, round(pixels / 18))) if bold else (0,)
        for shift in shifts:
            self._draw.text((x + shift, y), text, fill=colour, font=font, anchor=anchor)
        left, top, right, bottom = self._draw.textbbox((x, y), text, font=font, anchor=anchor)
        box = (int(left), int(top), int(-(-right // 1)) + shifts[-1], int(-(-bottom // 1)))
        return self._mark(Mark("text", text, box, pixels, colour))

    def tick_box(self, place: Point, side: float, *, ticked: bool, crossed: bool, colour: Colour) -> int:
        """Draws a box to tick; its lower left corner is given.

        Args:
            place: in points.
            side: its length in points.
            ticked: whether somebody did.
            crossed: two strokes from corner to corner, not a tick.
            colour: of the pen.

        Returns:
            Number of the mark.
        """
        left, bottom, length = self.px(place[0]), self.px(place[1]), max(6, self.px(side))
        box, pen = (left, bottom - length, left + length, bottom), max(2, self.px(1.4))
        self._draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=INK, width=max(1, self.px(0.6)))
        if ticked:
            corners = [(0.2, 0.2), (0.8, 0.8)], [(0.2, 0.8), (0.8, 0.2)]
            strokes = corners if crossed else ([(0.2, 0.5), (0.42, 0.76), (0.82, 0.22)],)
            for stroke in strokes:
                self._draw.line([(left + a * length, box[1] + b * length) for a, b in stroke], fill=colour, width=pen)
        return self._mark(Mark("tick box", "", box))

    def bar(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> int:
        """Draws a filled rectangle; places in points. Returns the number of the mark."""
        box = (self.px(left), self.px(top), self.px(right), self.px(bottom))
        self._draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
        return self._mark(Mark("bar", "", box, colour=colour))

    def point(self, place: Point, radius: float, colour: Colour) -> int:
        """Draws a dot; place and radius in points. Returns the number of the mark."""
        x, y, r = self.px(place[0]), self.px(place[1]), max(2, self.px(radius))
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        return self._mark(Mark("point", "", (x - r, y - r, x + r + 1, y + r + 1), colour=colour))

    def line(self, places: Sequence[Point], width: float = 0.6, colour: Colour = RULE) -> None:
        """Draws a line through places; all in points."""
        self._draw.line([(self.px(x), self.px(y)) for x, y in places], fill=colour, width=max(1, self.px(width)))

    def shade(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fills a rectangle that no question is about; places in points."""
        self._draw.rectangle(
            (self.px(left), self.px(top), self.px(right) - 1, self.px(bottom) - 1),
            fill=colour,
        )

    def item_map(self, marks: Sequence[int]) -> NDArray[np.uint8]:
        """Where some marks are, at most 255: ``(height, width)``, i + 1 in the box of the i-th, 0 elsewhere."""
        found = np.zeros((self.image.height, self.image.width), np.uint8)
        for number, mark in enumerate(marks, 1):
            left, top, right, bottom = self.marks[mark].box
            found[top:bottom, left:right] = number
        return found

    def _mark(self, mark: Mark) -> int:
        self.marks.append(mark)
        return len(self.marks) - 1
