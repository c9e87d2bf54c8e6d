"""Charts with bars or lines: a value, the year of the extreme, the year of a value."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .page import GREY, RULE, Colour, DocumentQuestion, Page
from .words import listed

__all__ = ["chart"]

#: Eight by five inches.
SIZE = (576.0, 360.0)
LEFT, RIGHT, TOP, BOTTOM = 70.0, 552.0, 84.0, 318.0
#: ChartQA (arXiv 2203.10244) lets a number read off an axis be off by a share of it.
TOLERANCE = 0.05
TITLES = listed(
    "Bicycles sold,Members of the club,Books borrowed,Visitors of the museum,Parcels delivered,Trees planted,"
    "Orders received,New subscribers,Passengers a day,Tickets sold,Houses built,Patients treated",
    ",",
)
SERIES = listed("North South East West Online Export Retail Adults Children Summer Winter")
COLOURS: tuple[Colour, ...] = ((38, 92, 168), (206, 92, 32), (44, 132, 76), (142, 56, 128), (170, 34, 46))


@dataclass(frozen=True)
class _Plot:
    """What is drawn.

    Attributes:
        title: of the chart.
        years: along the x axis.
        names: of the series; one empty name where there is one series.
        values: of each series, year by year.
        step: between the lines of the y axis.
        top: value at the upper end of it.
        labelled: whether the values stand above the bars.
    """

    title: str
    years: Sequence[int]
    names: Sequence[str]
    values: Sequence[Sequence[int]]
    step: int
    top: int
    labelled: bool

    def y(self, value: float) -> float:
        """Height of a value on the page, in points from the top."""
        return BOTTOM - (BOTTOM - TOP) * value / self.top


def chart(rng: random.Random, dpi: int) -> tuple[Page, list[DocumentQuestion]]:
    """Draws a chart, eight inches wide and five high.

    Args:
        rng: what is on it.
        dpi: pixels an inch.

    Returns:
        The page, and what can be asked about it.
    """
    bars = rng.random() < 0.5
    plot = _plot(rng, labelled=bars and rng.random() < 0.5)
    page = Page(SIZE, dpi)
    colours = rng.sample(COLOURS, len(plot.names))
    page.text((SIZE[0] / 2, 34), plot.title, 13, anchor="ms", bold=True)
    ticks = []
    for value in range(0, plot.top + 1, plot.step):
        y = plot.y(value)
        page.line([(LEFT, y), (RIGHT, y)], 0.6, GREY if value == 0 else RULE)
        ticks.append(page.text((LEFT - 6, y), f"{value:,}", 8, anchor="rm", colour=GREY))
    width = (RIGHT - LEFT) / len(plot.years)
    middles = [LEFT + width * (i + 0.5) for i in range(len(plot.years))]
    years = [
        page.text((x, BOTTOM + 15), str(year), 8, anchor="ms") for x, year in zip(middles, plot.years, strict=True)
    ]
    legend: list[tuple[int, ...]] = []
    x = LEFT
    for name, colour in zip(plot.names, colours, strict=True):
        if name:
            page.shade(x, 52, x + 9, 61, colour)
            legend.append((page.text((x + 14, 60), name, 8.5),))
            x += 90
        else:
            legend.append(())
    drawn = _bars(page, plot, middles, width, colours) if bars else _lines(page, plot, middles, colours)
    scale = () if plot.labelled else tuple(ticks)
    return page, [
        question for i in range(len(plot.names)) for question in _ask(plot, i, drawn[i], years, legend[i], scale)
    ]


def _plot(rng: random.Random, labelled: bool) -> _Plot:
    """Values: no two of a series are alike, nor two series in one year; multiples of half a step where not labelled."""
    count, first = rng.randint(5, 9), rng.randint(1995, 2016)
    steps, step = rng.choice((5, 6)), rng.choice((10, 20, 50, 100, 200, 500))
    halves = range(1, 2 * steps + 1)
    rows = [rng.sample(halves, count)]
    if rng.random() < 0.5:
        second = rng.sample(halves, count)
        while any(one == other for one, other in zip(*rows, second, strict=True)):
            second = rng.sample(halves, count)
        rows.append(second)
    half = step // 2
    values = [[half * k - (rng.randrange(half) if labelled else 0) for k in row] for row in rows]
    names = rng.sample(SERIES, 2) if len(rows) == 2 else [""]
    return _Plot(rng.choice(TITLES), range(first, first + count), names, values, step, steps * step, labelled)


Drawn = list[list[tuple[int, ...]]]


def _bars(page: Page, plot: _Plot, middles: Sequence[float], width: float, colours: Sequence[Colour]) -> Drawn:
    """Marks of each bar, and of its label where it has one."""
    each = 0.8 * width / len(plot.names)
    if len(plot.names) == 1:
        each = 0.55 * width
    drawn: Drawn = []
    for number, (values, colour) in enumerate(zip(plot.values, colours, strict=True)):
        row: list[tuple[int, ...]] = []
        for middle, value in zip(middles, values, strict=True):
            left = middle + each * (number - len(plot.names) / 2)
            bar = page.bar(left, plot.y(value), left + each, BOTTOM, colour)
            bar_marks: tuple[int, ...] = (bar,)
            if plot.labelled:
                bar_marks += (page.text((left + each / 2, plot.y(value) - 3), f"{value:,}", 7, anchor="ms"),)
            row.append(bar_marks)
        drawn.append(row)
    return drawn


def _lines(page: Page, plot: _Plot, middles: Sequence[float], colours: Sequence[Colour]) -> Drawn:
    """Marks of each point."""
    for values, colour in zip(plot.values, colours, strict=True):
        page.line([(x, plot.y(value)) for x, value in zip(middles, values, strict=True)], 1.6, colour)
    return [
        [(page.point((x, plot.y(value)), 3, colour),) for x, value in zip(middles, values, strict=True)]
        for values, colour in zip(plot.values, colours, strict=True)
    ]


def _ask(
    plot: _Plot,
    series: int,
    drawn: Sequence[tuple[int, ...]],
    years: Sequence[int],
    legend: tuple[int, ...],
    scale: tuple[int, ...],
) -> list[DocumentQuestion]:
    """What can be asked about one series."""
    values, name = plot.values[series], plot.names[series]
    of = f'"{plot.title}" for "{name}"' if name else f'"{plot.title}"'
    questions = []
    for i, (year, value) in enumerate(zip(plot.years, values, strict=True)):
        about = (*drawn[i], years[i], *legend, *scale)
        shown, text = (f"{value:,}",), f"What is the value of {of} in {year}?"
        tolerance = 0.0 if plot.labelled else TOLERANCE
        questions.append(DocumentQuestion("chart-value", text, shown, about, numeric=True, tolerance=tolerance))
        text = f"In which year is the value of {of} {'' if plot.labelled else 'about '}{value:,}?"
        questions.append(DocumentQuestion("chart-year", text, (str(year),), about))
    for word, value in (("highest", max(values)), ("lowest", min(values))):
        best = values.index(value)
        about = (*legend, years[best], *(mark for marks in drawn for mark in marks))
        text = f"In which year is the value of {of} {word}?"
        questions.append(DocumentQuestion("chart-extreme", text, (str(plot.years[best]),), about))
    return questions
