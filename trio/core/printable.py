"""Text from files that others wrote, made safe to print."""

from __future__ import annotations

import re

__all__ = ["HIDDEN", "visible"]

#: What steers a terminal or turns the direction of a line: C0, DEL and C1 controls, marks of direction, the line and
#: paragraph separators of Unicode, lone surrogates.
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "\n") -> str:
    """The text with each hidden character written out as in Python, `x1b` for an escape; those in `keep` stay."""
    return HIDDEN.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)
