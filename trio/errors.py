"""The errors of the package.

Every error that the package raises on purpose is a `TrioError`. Its message is one paragraph that names the place, says
what was found and what is allowed, and ends with the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttachError",
    "BudgetError",
    "BusyError",
    "CacheError",
    "InputError",
    "NonFiniteError",
    "PluginError",
    "SpecError",
    "TrioError",
    "UnknownNameError",
    "UnsupportedModelError",
]


class TrioError(Exception):
    """Base of every error that the package raises on purpose: one `except` catches them all."""


class SpecError(TrioError):
    """A spec, or a parameter of a part, is wrong.

    Attributes:
        spec_path: where in the spec, for example `stages[1].keep`; empty for the whole file.
        line: 1-based line in the file that the spec came from, or None.
    """

    def __init__(self, message: str, *, spec_path: str = "", line: int | None = None) -> None:
        """Keep the message, and the spec path and line for tools that point at them."""
        super().__init__(message)
        self.spec_path = spec_path
        self.line = line


class UnknownNameError(TrioError, LookupError):
    """A name that no registry, no shipped spec and no zoo model has; the message suggests the nearest ones."""


class PluginError(TrioError, ImportError):
    """A third-party part was found through its entry point, but could not be loaded."""


class UnsupportedModelError(TrioError):
    """The model, or a combination of model and parts, cannot work; the message says what is missing and would fit."""


class BudgetError(TrioError):
    """A count or a token budget cannot be met; the message says what is reachable."""


class AttachError(TrioError):
    """Attaching is impossible now: attached already, another pipeline is on, or the model is in training mode."""


class CacheError(TrioError):
    """The key-value cache cannot hold layers of different lengths, or does not belong to this pipeline's prefill."""


class InputError(TrioError, ValueError):
    """An argument, a file or a model input cannot be used; the message names it and says what would do."""


class BusyError(InputError, TimeoutError):
    """Another thread uses the model, and this one is not to wait, or has waited as long as it was told."""


class NonFiniteError(TrioError, ArithmeticError):
    """Hidden states or saliencies hold NaN or infinity, so that no choice of tokens would mean anything."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """The at most `limit` known names most similar to `name`, best first (case does not count)."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=limit, cutoff=0.55)
    if not close:  # "visionzip" should find "visionzip-64" and "zip" "visionzip"
        close = [key for key in folded if name and (name.casefold() in key or key in name.casefold())][:limit]
    return [folded[key] for key in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence `Did you mean 'x' or 'y'? `, or an empty string where nothing is near."""
    close = nearest(name, known)
    return f"Did you mean {' or '.join(repr(candidate) for candidate in close)}? " if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
