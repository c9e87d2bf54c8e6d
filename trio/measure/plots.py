"""Figures on disk: matplotlib without a display, written or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import DISTRIBUTION
from ..errors import InputError

__all__ = ["matplotlib", "save"]


def matplotlib() -> Any:
    """The module `matplotlib.figure`, which needs no display.

    Raises:
        InputError: it is not installed.
    """
    try:
        import matplotlib.figure as module
    except ImportError as error:
        raise InputError(
            f"plot: matplotlib is missing; install it with `pip install {DISTRIBUTION}[plot]`, or leave the plot out."
        ) from error
    return module


def save(figure: Any, file: Path, option: str = "plot") -> None:
    """Writes a figure (PNG, PDF or SVG, by the file's name).

    Raises:
        InputError: the file cannot be written.
    """
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{option} {str(file)!r}: cannot be written ({error}); end the name in .png, .pdf or .svg."
        ) from error
