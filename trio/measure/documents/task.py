"""The document probe: invoices, forms, tables and charts, drawn when needed, with known answers.

It is for checkpoints of one's own: what a spec loses on small print, without data of others. `docs/documents.md`
says what is asked; a test reads every answer back from the page.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Literal

from ...errors import InputError
from ..evaluation.task import Task
from .answers import DocumentSample
from .charts import chart
from .forms import form
from .invoices import invoice
from .page import DocumentQuestion, Page
from .tables import table

__all__ = ["ASKED", "DPI", "HINT", "SPLITS", "VERSION", "check_documents", "document", "documents"]

VERSION = 1
#: Documents of each split: ``test`` is reported, ``validation`` is for choosing.
SPLITS = {"test": 1000, "validation": 400}
SEED = 1707
#: Documents that `trio eval` asks about where none are named.
DEFAULT_LIMIT = 80
#: Pixels an inch: small print of 6.5 points is 7 pixels high at the least, and an A4 sheet 3.9 million pixels at most.
DPI = range(75, 201)
DEFAULT_DPI = 100
MAX_NEW_TOKENS = 32
#: What stands behind every question, as is usual for benchmarks with short answers.
HINT = "Answer the question using a single word or phrase."
#: Sub-tasks, and how many questions of each a document is asked.
ASKED = {
    "invoice-field": 2,
    "invoice-item": 2,
    "invoice-total": 1,
    "form-field": 2,
    "form-choice": 1,
    "form-box": 2,
    "table-cell": 2,
    "table-maximum": 2,
    "table-rows": 1,
    "chart-value": 2,
    "chart-extreme": 1,
    "chart-year": 1,
}
Split = Literal["test", "validation"]
_KINDS: tuple[Callable[[random.Random, int], tuple[Page, list[DocumentQuestion]]], ...] = (invoice, form, table, chart)


def documents(split: Split = "test", *, limit: int = DEFAULT_LIMIT, dpi: int = DEFAULT_DPI, seed: int = SEED) -> Task:
    """Questions about drawn documents; about 4 MB of memory a document at 100 dpi.

    Args:
        split: ``test`` or ``validation``.
        limit: documents, at most the size of the split (`SPLITS`); invoice, form, table and chart take turns.
        dpi: pixels an inch, 75 to 200; the same documents in another size.
        seed: other seeds give other documents of the same kind; results name the seed.

    Raises:
        InputError: there is no such split, it has fewer documents, or `dpi` is out of range.
    """
    check_documents(split, limit, dpi)
    heard: dict[str, Counter[str]] = {kind: Counter() for kind in ASKED}
    samples = tuple(
        sample for index in range(limit) for sample in _samples(*document(split, seed, index, dpi), index, heard)
    )
    facts = {"split": split, "dpi": dpi, "seed": seed, "documents": limit}
    return Task("documents", VERSION, samples, MAX_NEW_TOKENS, facts, graded=True)


def check_documents(split: str, limit: int, dpi: int) -> None:
    """Refuse what cannot be drawn, before a model is loaded.

    Raises:
        InputError: as `documents` says.
    """
    if split not in SPLITS:
        raise InputError(f"documents: split {split!r} is unknown; allowed: {', '.join(SPLITS)}.")
    if not 0 < limit <= SPLITS[split]:
        raise InputError(
            f"documents: limit {limit}: the split {split!r} has {SPLITS[split]} documents; give 1 to {SPLITS[split]}."
        )
    if dpi not in DPI:
        raise InputError(f"documents: dpi {dpi} is out of range; give {DPI[0]} to {DPI[-1]} pixels an inch.")


def document(split: Split, seed: int, index: int, dpi: int = DEFAULT_DPI) -> tuple[Page, list[DocumentQuestion]]:
    """A page, and the questions of it that are asked from; a function of its arguments alone.

    Questions of each sub-task are in random order.
    """
    rng = random.Random(f"trio-documents/{VERSION}/{split}/{seed}/{index}")
    page, questions = _KINDS[index % len(_KINDS)](rng, dpi)
    rng.shuffle(questions)
    return page, questions


def _samples(
    page: Page, questions: list[DocumentQuestion], index: int, heard: dict[str, Counter[str]]
) -> list[DocumentSample]:
    """Of each sub-task the questions whose answers were asked for least so far."""
    asked: list[DocumentQuestion] = []
    for kind, number in ASKED.items():
        options = [question for question in questions if question.kind == kind]
        for _ in range(min(number, len(options))):
            best = min(options, key=lambda question: heard[question.kind][question.answers[0]])
            options.remove(best)
            heard[kind][best.answers[0]] += 1
            asked.append(best)
    things = list(dict.fromkeys(mark for question in asked for mark in question.about))
    number_of = {mark: number for number, mark in enumerate(things)}
    item_map = page.item_map(things)
    return [
        DocumentSample(
            page.image,
            f"{question.text}\n{HINT}",
            question.answers,
            question.kind,
            index,
            item_map,
            tuple(number_of[mark] for mark in question.about),
            numeric=question.numeric,
            tolerance=question.tolerance,
            unit=question.unit,
        )
        for question in asked
    ]
