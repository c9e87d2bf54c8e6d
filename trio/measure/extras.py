"""Libraries of the extra `eval`, which the base install does not have."""

from __future__ import annotations

import importlib
from typing import Any

from .. import DISTRIBUTION
from ..errors import InputError

__all__ = ["require"]


def require(module: str, purpose: str) -> Any:
    """A module of the extra `eval`.

    Args:
        module: its name.
        purpose: what needs it, as messages say it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise InputError(
            f"{purpose}: {library} is not installed; install the extra that has it: pip install '{DISTRIBUTION}[eval]'."
        ) from error
