"""Wide tables in small print: a cell, the maximum of a column, the number of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .page import A4, GREY, RULE, DocumentQuestion, Page
from .words import CITIES, person

__all__ = ["table"]

ROWS = (8, 26)


@dataclass(frozen=True)
class _Subject:
    """What a table is about.

    Attributes:
        title: above the table.
        key: heads the first column, which names the rows.
        people: heads the column of names of people.
        columns: those of numbers: what heads them, and the least and the largest value.
    """

    title: str
    key: str
    people: str
    columns: tuple[tuple[str, int, int], ...]


SUBJECTS = (
    _Subject(
        "Weather stations, yearly values",
        "Station",
        "Observer",
        (
            ("Rain, mm", 280, 1900),
            ("Sun, hours", 900, 2400),
            ("Wind, km/h", 60, 190),
            ("Snow, cm", 1, 160),
            ("Altitude, m", 2, 2400),
            ("Frost, days", 1, 140),
        ),
    ),
    _Subject(
        "Branches, second quarter",
        "Branch",
        "Manager",
        (
            ("Staff", 4, 90),
            ("Visitors", 900, 48_000),
            ("Sales", 2_000, 960_000),
            ("Returns", 3, 900),
            ("Complaints", 1, 120),
            ("Area", 80, 4_200),
        ),
    ),
    _Subject(
        "Stock on 30 June",
        "Article",
        "Buyer",
        (
            ("In stock", 10, 4_000),
            ("Sold", 10, 9_000),
            ("On order", 5, 2_500),
            ("Damaged", 1, 90),
            ("Shelf", 100, 999),
            ("Weight, g", 40, 18_000),
        ),
    ),
)


def table(rng: random.Random, dpi: int) -> tuple[Page, list[DocumentQuestion]]:
    """Draws a table on a sheet of A4 that lies on its side.

    Args:
        rng: what is on it.
        dpi: pixels an inch.

    Returns:
        The page, and what can be asked about it.
    """
    page, subject = Page((A4[1], A4[0]), dpi), rng.choice(SUBJECTS)
    rows, size = rng.randint(*ROWS), rng.uniform(6.5, 9.0)
    keys = _keys(rng, subject, rows)
    columns = rng.sample(subject.columns, rng.randint(4, 6))
    heads, cells = [subject.key], [keys]
    for name, low, high in columns:
        heads.append(name)
        cells.append([f"{value:,}" for value in rng.sample(range(low, high + 1), rows)])
    where = rng.randint(1, len(heads))
    heads.insert(where, subject.people)
    cells.insert(where, [person(rng) for _ in range(rows)])
    page.text((42, 48), subject.title, 13, bold=True)
    head_marks, marks = _draw(rng, page, heads, cells, size, where)
    page.text((42, 570), "Figures are provisional. Enquiries to the head office.", 6.5, colour=GREY)
    return page, _questions(subject, heads, cells, head_marks, marks, where)


def _keys(rng: random.Random, subject: _Subject, rows: int) -> list[str]:
    """Names of the rows."""
    if subject.key != "Article":
        return rng.sample(CITIES, rows)
    return [
        f"{rng.choice('BDGKMPRT')}{rng.choice('ACEX')}-{number}" for number in rng.sample(range(1000, 10_000), rows)
    ]


def _draw(
    rng: random.Random, page: Page, heads: Sequence[str], cells: Sequence[Sequence[str]], size: float, people: int
) -> tuple[list[int], list[list[int]]]:
    """Draws heads and cells; gives their marks, those of cells column by column."""
    zebra, step, width = rng.random() < 0.5, 1.95 * size, (page.size[0] - 84) / len(heads)
    top, rows = 74.0, len(cells[0])
    if zebra:
        for row in range(0, rows, 2):
            y = top + step * (row + 1) + 0.35 * size
            page.shade(42, y - step, page.size[0] - 42, y, (238, 241, 246))

    def write(column: int, y: float, text: str, bold: bool = False) -> int:
        left = column in (0, people)
        x = (54 if column else 46) + width * column if left else 38 + width * (column + 1)
        return page.text((x, y), text, size, anchor="ls" if left else "rs", bold=bold)

    head_marks = [write(column, top, head, bold=True) for column, head in enumerate(heads)]
    page.line([(42, top + 0.5 * size), (page.size[0] - 42, top + 0.5 * size)], 0.8, GREY)
    marks = []
    for column, texts in enumerate(cells):
        marks.append([write(column, top + step * (row + 1) - 0.2 * size, text) for row, text in enumerate(texts)])
    if not zebra:
        for row in range(1, rows + 1):
            y = top + step * (row + 1) - 0.2 * size - 1.2 * size
            page.line([(42, y), (page.size[0] - 42, y)], 0.4, RULE)
    return head_marks, marks


def _questions(
    subject: _Subject,
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    head_marks: Sequence[int],
    marks: Sequence[Sequence[int]],
    people: int,
) -> list[DocumentQuestion]:
    keys, row_word = cells[0], subject.key.lower()
    questions = [
        DocumentQuestion(
            "table-rows",
            "How many rows does the table have, not counting the row of headings?",
            (str(len(keys)),),
            tuple(marks[0]),
            numeric=True,
        )
    ]
    for column, head in enumerate(heads[1:], 1):
        for row, key in enumerate(keys):
            about = (marks[0][row], marks[column][row], head_marks[column])
            text = f'What is in the column "{head}" for the {row_word} {key}?'
            numeric, unit = column != people, _unit(head)
            answers = (cells[column][row],)
            questions.append(DocumentQuestion("table-cell", text, answers, about, numeric=numeric, unit=unit))
        if column == people:
            continue
        values = [int(cell.replace(",", "")) for cell in cells[column]]
        best = values.index(max(values))
        whole_column = (head_marks[column], marks[0][best], *marks[column])
        text = f'What is the highest value in the column "{head}"?'
        answers = (cells[column][best],)
        questions.append(DocumentQuestion("table-maximum", text, answers, whole_column, numeric=True, unit=_unit(head)))
        text = f'Which {row_word} has the highest value in the column "{head}"?'
        questions.append(DocumentQuestion("table-maximum", text, (keys[best],), whole_column))
    return questions


def _unit(head: str) -> str:
    """The unit behind a comma."""
    return head.partition(", ")[2]
