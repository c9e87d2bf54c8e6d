"""A console for text that others wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..core.printable import HIDDEN

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """Leaves out what would steer the terminal; it has no width, so that tables stay as they were laid out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As of the base class, without hidden characters."""
        for segment in super().render(renderable, options):
            if segment.control or HIDDEN.search(segment.text) is None:
                yield segment
            else:
                yield Segment(HIDDEN.sub(_line_feed, segment.text), segment.style)


def _line_feed(match: Any) -> str:
    return "\n" if match[0] == "\n" else ""
