"""Answers read back from a drawn page: from the texts and where they stand, and from pixels. Nothing of the generator's
own numbers is used, so that what is asked is shown to be what is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trio.measure.documents.page import Mark, Page

Pixels = NDArray[np.int64]


def middle(mark: Mark) -> tuple[float, float]:
    left, top, right, bottom = mark.box
    return (left + right) / 2, (top + bottom) / 2


class Reader:
    """Reads one page."""

    def __init__(self, page: Page) -> None:
        self.page, self.pixels = page, np.asarray(page.image).astype(int)
        self.texts = [mark for mark in page.marks if mark.kind == "text"]
        self.boxes = [mark for mark in page.marks if mark.kind == "tick box"]

    def answer(self, kind: str, question: str) -> str | float:
        """A number only for what is read off an axis."""
        readers: dict[str, Callable[[str], str | float]] = {
            "invoice-field": self._invoice_field,
            "invoice-total": self._invoice_total,
            "invoice-item": self._invoice_item,
            "form-field": self._form_field,
            "form-choice": self._form_choice,
            "form-box": self._form_box,
            "table-cell": self._table_cell,
            "table-maximum": self._table_maximum,
            "table-rows": self._table_rows,
            "chart-value": self._chart_value,
            "chart-extreme": self._chart_extreme,
            "chart-year": self._chart_year,
        }
        return readers[kind](question)

    # Finding

    def find(self, text: str, among: Sequence[Mark] | None = None) -> Mark:
        """The only text that reads so."""
        (found,) = [one for one in (self.texts if among is None else among) if one.text.casefold() == text.casefold()]
        return found

    def row(self, mark: Mark, among: Sequence[Mark] | None = None) -> list[Mark]:
        """What stands at the height of a mark, from left to right, without itself."""
        near = self.page.px(5)
        others = self.texts if among is None else among
        found = [one for one in others if one is not mark and abs(middle(one)[1] - middle(mark)[1]) < near]
        return sorted(found, key=lambda one: one.box[0])

    def right_of(self, mark: Mark) -> Mark:
        return next(one for one in self.row(mark) if one.box[0] >= mark.box[2])

    def column(self, head: Mark) -> list[Mark]:
        """What stands below a heading, on its left or its right edge, until the table ends."""
        near, gap, found = self.page.px(1.5), 0, [head]
        below = [
            one
            for one in self.texts
            if one.box[1] > head.box[1] and min(abs(one.box[0] - head.box[0]), abs(one.box[2] - head.box[2])) <= near
        ]
        for one in sorted(below, key=lambda one: one.box[1]):
            step = one.box[3] - found[-1].box[3]
            if gap and step > 1.6 * gap:
                break
            gap = gap or step
            found.append(one)
        return found[1:]

    def inked(self, box: Mark) -> bool:
        """Whether there is something inside a box to tick."""
        left, top, right, bottom = box.box
        return bool((self.pixels[top + 3 : bottom - 3, left + 3 : right - 3].min(-1) < 128).any())

    # Invoices

    def _invoice_field(self, question: str) -> str:
        name = re.fullmatch(r"What is the (.+) of this invoice\?", question)
        assert name is not None
        return self.right_of(self.find(name[1])).text

    def _invoice_total(self, question: str) -> str:
        labels = {"subtotal": "Subtotal", "VAT": "VAT", "shipping cost": "Shipping", "total amount due": "Total due"}
        name = re.fullmatch(r"How much is the (.+) on this invoice\?", question)
        assert name is not None
        (label,) = [one for one in self.texts if one.text.startswith(labels[name[1]])]
        return self.right_of(label).text

    def _invoice_item(self, question: str) -> str:
        for words, head in (("quantity", "Quantity"), ("unit price", "Unit price"), ("amount", "Amount")):
            if words in question.partition('"')[0]:
                return self._cell(self.find(question.split('"')[1]), head)
        raise AssertionError(question)

    def items(self) -> list[list[str]]:
        """Quantity, price and amount of every line."""
        return [[one.text for one in self.row(name)] for name in self.column(self.find("Description"))]

    def _cell(self, key: Mark, head: str) -> str:
        (found,) = [one for one in self.column(self.find(head)) if one in self.row(key)]
        return found.text

    # Forms

    def _form_field(self, question: str) -> str:
        label = self.find(question.split('"')[1])
        below = [
            one for one in self.texts if one.box[1] > label.box[1] and abs(one.box[0] - label.box[0]) < self.page.px(8)
        ]
        return min(below, key=lambda one: one.box[1]).text

    def _form_choice(self, question: str) -> str:
        group = self.find(question.split('"')[1])
        first = min((one for one in self.boxes if one.box[1] > group.box[3]), key=lambda one: one.box[1])
        (ticked,) = [box for box in [first, *self.row(first, self.boxes)] if self.inked(box)]
        return self.right_of(ticked).text

    def _form_box(self, question: str) -> str:
        (box,) = self.row(self.find(question.split('"')[1]), self.boxes)
        return "yes" if self.inked(box) else "no"

    # Tables

    def _head(self) -> list[Mark]:
        """The row of headings: the first one below the title."""
        title = min(self.texts, key=lambda one: one.box[1])
        first = min((one for one in self.texts if one is not title), key=lambda one: (one.box[1], one.box[0]))
        return sorted([first, *self.row(first)], key=lambda one: one.box[0])

    def _table_cell(self, question: str) -> str:
        key = question.rstrip("?").split()[-1]
        return self._cell(self.find(key), question.split('"')[1])

    def _table_maximum(self, question: str) -> str:
        cells = self.column(self.find(question.split('"')[1]))
        numbers = [int(one.text.replace(",", "")) for one in cells]
        assert numbers.count(max(numbers)) == 1
        best = cells[numbers.index(max(numbers))]
        return best.text if question.startswith("What") else self.row(best)[0].text

    def _table_rows(self, question: str) -> str:
        return str(len(self.column(self._head()[0])))

    # Charts, from pixels

    def scale(self) -> tuple[float, float]:
        """Value of a pixel's height, and of the upper edge of the image, from the numbers on the axis."""
        years = [one for one in self.texts if re.fullmatch(r"(19|20)\d\d", one.text)]
        ticks = [one for one in self.texts if re.fullmatch(r"[\d,]+", one.text)]
        edge = min(one.box[2] for one in ticks)
        ticks = [
            one
            for one in ticks
            if one not in years and one.box[2] <= edge + self.page.px(40) and one.pixels == self.page.px(8)
        ]
        slope, start = np.polyfit(
            [middle(one)[1] for one in ticks], [int(one.text.replace(",", "")) for one in ticks], 1
        )
        return float(slope), float(start)

    def _series(self, question: str) -> dict[int, float]:
        """Values by year, read off the axis."""
        quoted = question.split('"')[1::2]
        self.find(quoted[0])  # the title
        years = [one for one in self.texts if re.fullmatch(r"(19|20)\d\d", one.text)]
        lowest = max(one.box[1] for one in years)
        years = [one for one in years if one.box[1] == lowest]
        height, drawn_until = self.page.image.height, min(one.box[1] for one in years) - self.page.px(2)
        if len(quoted) > 1:
            name = self.find(quoted[1])
            colour = self.pixels[round(middle(name)[1]), name.box[0] - self.page.px(9)]
        else:
            body = self.pixels[self.page.px(70) : drawn_until].reshape(-1, 3)
            loud = body[(body.max(1) - body.min(1)) > 60]
            colour = np.unique(loud, axis=0, return_counts=True)
            colour = colour[0][colour[1].argmax()]
        same = (np.abs(self.pixels - colour).max(-1) <= 8) & (np.arange(height)[:, None] < drawn_until)
        same[: self.page.px(66)] = False  # the legend
        slope, start = self.scale()
        bars = any(one.kind == "bar" for one in self.page.marks)
        reach = (middle(years[1])[0] - middle(years[0])[0]) / 2 if bars else 1
        values = {}
        for year in years:
            x = middle(year)[0]
            rows = np.flatnonzero(same[:, round(x - reach) : round(x + reach)].any(1))
            y = rows.min() if bars else (rows.min() + rows.max()) / 2
            values[int(year.text)] = slope * float(y) + start
        return values

    def _chart_value(self, question: str) -> float:
        return self._series(question)[int(question.rstrip("?").split()[-1])]

    def _chart_extreme(self, question: str) -> str:
        values = self._series(question)
        return str((max if "highest" in question else min)(values, key=lambda year: values[year]))

    def _chart_year(self, question: str) -> str:
        value, values = int(question.rstrip("?").split()[-1].replace(",", "")), self._series(question)
        return str(min(values, key=lambda year: abs(values[year] - value)))
