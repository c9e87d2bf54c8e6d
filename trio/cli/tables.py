"""How results look on a terminal: the console, tables for any width, and numbers for people."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Column, Table

__all__ = [
    "console",
    "duration",
    "layer_ranges",
    "print_notes",
    "print_table",
    "quantity",
    "times",
]

#: Columns of a column of prose below which a table is laid out as a list.
PROSE = 24
WIDTH = 100


def console() -> Console:
    """The console for results: standard output, 100 columns (or `COLUMNS`) where it is no terminal."""
    from .terminal import SafeConsole

    out = SafeConsole(highlight=False, soft_wrap=False)
    if out.is_terminal:
        return out
    columns = os.environ.get("COLUMNS", "")
    return SafeConsole(highlight=False, width=int(columns) if columns.isdecimal() and int(columns) else WIDTH)


def print_table(out: Console, table: Table) -> None:
    """A table; where the console is too narrow for its numbers, one row after the other as a list."""
    if table.columns and sum(_needed(column) + 3 for column in table.columns) + 1 > out.width:
        _print_rows(out, table)
    else:
        out.print(table)


def _needed(column: Column) -> int:
    """Columns of the terminal that a column cannot do without: numbers are not wrapped, prose is."""
    from rich.cells import cell_len

    texts = [str(cell) for cell in (column.header, *column.cells)]
    widest = max(cell_len(line) for text in texts for line in text.split("\n"))
    if column.justify == "right" or column.no_wrap:
        return widest
    return max([min(widest, PROSE), *(cell_len(word) for text in texts for word in text.split())])


def _print_rows(out: Console, table: Table) -> None:
    from rich.padding import Padding
    from rich.text import Text

    if table.title:
        out.print(Text(str(table.title), style="bold"))
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        head, *rest = cells
        if str(head).strip():
            out.print(Text(str(head).strip(), style="bold"))
        for column, cell in zip(table.columns[1:], rest, strict=True):
            text = cell if isinstance(cell, Text) else Text(str(cell))
            if text.plain.strip():
                name = f"{column.header}: " if str(column.header) else ""
                line = Text(name).append_text(Text(" ").join(text.split("\n")))
                out.print(Padding(line, (0, 0, 0, 2), expand=False))


def print_notes(out: Console, notes: Sequence[str], most: int = 6) -> None:
    """Notes, a line each; of many only the first, and how many more there are."""
    from rich.text import Text

    for note in notes[:most]:
        out.print(Text(f"note: {note}"))
    if len(notes) > most:
        out.print(Text(f"and {len(notes) - most} more notes; --json prints them all"))


def times(value: float | None) -> str:
    """A ratio for people: `5.13x`."""
    return "?" if value is None else f"{value:.2f}x"


def quantity(value: float, unit: str, *, base: int = 1000) -> str:
    """A large number with a prefix: `2.98 TFLOP`, `1.5 MiB` (with base 1024)."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    index = 0
    while value >= base and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    prefix = prefixes[index] + ("i" if base == 1024 and index else "")
    return f"{value:.0f} {unit}" if index == 0 else f"{value:.2f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds above."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def layer_ranges(*columns: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Runs of layers over which every column is constant, counted from 1: [("1-16", (576, 96)), ...]."""
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for layer, values in enumerate(zip(*columns, strict=True), start=1):
        if runs and runs[-1][2] == values:
            runs[-1] = (runs[-1][0], layer, values)
        else:
            runs.append((layer, layer, values))
    return [(str(first) if first == last else f"{first}-{last}", values) for first, last, values in runs]
