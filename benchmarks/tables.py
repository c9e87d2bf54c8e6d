"""What the pages made from results share: budgets, names of controls, words for differences, Markdown, blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from trio.measure.evaluation.results import Comparison, EvaluationResults, RowResult

LEVEL = 0.05


def method(name: str) -> str:
    """A spec's name without its budget: ``visionzip`` of ``visionzip, 33%``."""
    return re.sub(r", [\d.]+%$", "", name)


def budgets(results: EvaluationResults) -> Iterator[tuple[RowResult, list[RowResult]]]:
    """The default of each budget, with the methods that are compared with it, itself first."""
    others = {one.row: one.baseline for one in results.comparisons if not results.row(one.row).control}
    for base in results.methods:
        if base.name not in others:
            yield base, [base, *(one for one in results.methods if others.get(one.name) == base.name)]


def smaller(row: RowResult) -> str:
    """What a control at equal tokens or equal cost is: ``resize``, or ``average-pool`` where images have one size."""
    compressor = (row.spec or {}).get("compressor")
    return "resize" if compressor is None else "average-pool"


def shown_name(row: RowResult) -> str:
    """A row's name in tables; results of earlier versions call the rows of equal tokens ``lower resolution``."""
    if row.control == "equal tokens" and row.name.startswith("lower resolution"):
        return f"{smaller(row)}, equal tokens{row.name.removeprefix('lower resolution')}"
    return row.name


def flipped(one: Comparison) -> str:
    """A floor minus a method as the method minus the floor."""
    gap = one.difference
    return f"{-gap.mean:+z.1f} ({-gap.high:+z.1f} to {-gap.low:+z.1f})"


def table_row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def table_head(cells: Sequence[str]) -> str:
    """The first two lines of a table: words on the left, numbers on the right."""
    return f"{table_row(cells)}\n{table_row(['---'] + ['---:'] * (len(cells) - 1))}"


def with_block(text: str, block: str, page: str) -> str:
    """A page with one block renewed.

    Args:
        text: of the page, with the first and the last line of the block.
        block: from the line that marks its begin to the line that marks its end.
        page: its name.

    Raises:
        SystemExit: the page lacks one of the two lines.
    """
    lines = block.splitlines()
    before, begin, rest = text.partition(lines[0])
    _, end, after = rest.partition(lines[-1])
    if not begin or not end:
        raise SystemExit(f"{page}: put the lines {lines[0]!r} and {lines[-1]!r} where the block should stand")
    return before + block + after


def write_block(page: Path, block: str) -> None:
    """As `with_block`, in a file."""
    text = with_block(page.read_text(encoding="utf-8"), block, page.name)
    page.write_text(text, encoding="utf-8")
