"""The font of everything that is drawn: the one inside Pillow, the same on every machine."""

from __future__ import annotations

import functools

from PIL import ImageFont

__all__ = ["drawing_font"]


@functools.cache
def drawing_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own outline font; it has the characters of ASCII.

    Args:
        size: of an em, in pixels.

    Raises:
        RuntimeError: this Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):  # a Pillow without FreeType has one tiny bitmap font
        raise RuntimeError("drawing text needs a Pillow built with FreeType support")
    return font
