"""When an answer about a document is right, and how near a wrong one is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..evaluation.task import LabelledSample
from .words import listed

__all__ = ["DocumentSample", "number"]

_CURRENCY = r"(?:us\$|\$|eur|euros?|gbp|pounds?|chf|francs?|usd|dollars?|[\u20ac\u00a3%])"
_DIGITS = r"[-+]?(?:\d{1,3}(?:[,' \u00a0\u202f]\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(rf"(?:{_CURRENCY}\s*)?({_DIGITS})(?:\s*{_CURRENCY})?")
_WORDS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


@dataclass(frozen=True)
class DocumentSample(LabelledSample):
    """A question about a document.

    Attributes:
        numeric: whether answers are compared as numbers: without currency, separators of thousands and unit.
        tolerance: share of the number that an answer may be off.
        unit: a word that may stand behind the number.
    """

    numeric: bool = False
    tolerance: float = 0.0
    unit: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether an answer is one of `answers`, as a number where it is one, else up to case and punctuation."""
        if not self.numeric:
            return super().is_right(answer)
        given = number(answer, self.unit)
        if given is None:
            return False
        expected = [value for one in self.answers if (value := number(one, self.unit)) is not None]
        return any(abs(given - value) <= self.tolerance * abs(value) + 1e-9 for value in expected)


def number(text: str, unit: str = "") -> float | None:
    """The number that a text is, and nothing else.

    Thousands may be separated by commas, blanks or apostrophes, the decimal point is a point; a currency, a percent
    sign or the unit may stand beside it. Up to twenty it may be a word.

    Args:
        text: an answer.
        unit: may stand behind the number.

    Returns:
        None where the text is no such number.
    """
    plain = " ".join(text.casefold().split()).rstrip(".")
    if unit:
        plain = plain.removesuffix(unit.casefold()).rstrip()
    if plain in _WORDS:
        return float(_WORDS.index(plain))
    found = _NUMBER.fullmatch(plain)
    return None if found is None else float(re.sub(r"[,' \u00a0\u202f]", "", found[1]))
