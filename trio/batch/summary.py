"""What a job gave, in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.record import Document
from ..errors import InputError
from .answerer import RowOutput

__all__ = ["BatchSummary", "summarise"]


class BatchSummary(Document):
    """All rows of a job, whichever run answered them.

    Attributes:
        rows: how many.
        answered: rows with an answer.
        errors: rows without one.
        examples: id and reason of the first errors, at most three.
        known: rows that say which answers are right.
        right: of these, rows with such an answer; a row with an error is none.
        accuracy: `right` / `known`; None where no row says so.
        visual_tokens: before any reduction, mean over the answered rows.
        kept: averaged over the decoder layers, mean over the answered rows.
        new_tokens: of all answers together.
    """

    rows: int
    answered: int
    errors: int
    examples: dict[str, str]
    known: int
    right: int
    accuracy: float | None
    visual_tokens: float
    kept: float
    new_tokens: int


def summarise(results: Iterable[RowOutput], expected: int) -> BatchSummary:
    """Adds up what is written.

    Args:
        results: all of it.
        expected: rows of the input.

    Raises:
        InputError: a row is there twice, or the number of rows is not that of the input.
    """
    seen: set[str] = set()
    answered = known = right = visual = new = 0
    kept = 0.0
    examples: dict[str, str] = {}
    for one in results:
        if one.id in seen:
            raise InputError(f"out: the row {one.id!r} is there twice; two jobs wrote there. Give another --out.")
        seen.add(one.id)
        if one.error is None:
            answered, visual, kept, new = (
                answered + 1,
                visual + one.visual_tokens,
                kept + one.kept,
                new + one.new_tokens,
            )
        elif len(examples) < 3:
            examples[one.id] = one.error
        if one.right is not None:
            known, right = known + 1, right + one.right
    if len(seen) != expected:
        raise InputError(f"out: {len(seen)} of {expected} rows are there; give the same command again to go on.")
    return BatchSummary(
        rows=len(seen),
        answered=answered,
        errors=len(seen) - answered,
        examples=examples,
        known=known,
        right=right,
        accuracy=right / known if known else None,
        visual_tokens=visual / max(answered, 1),
        kept=kept / max(answered, 1),
        new_tokens=new,
    )
