"""Smaller images in front of the processor: the baseline of every reduction, and the first step of a spec.

A processor of Qwen's kind lays a grid over an image, one cell a visual token, and rounds the image's sides to whole
cells. An image is resized to whole cells here, so that the processor finds nothing to round.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor, sqrt
from typing import Any

from PIL import Image

from ..core.upstream import PatchProcessor, patch_processor, with_image_processor
from ..errors import InputError

__all__ = ["Goal", "resize_image", "resized_size", "resizing_processor"]

#: From the visual tokens of an image to those that it is to have.
Goal = Callable[[int], int]


def resized_size(size: tuple[int, int], patches: PatchProcessor, goal: Goal) -> tuple[int, int] | None:
    """The width and height in pixels to which an image is resized; None where it stays as it is.

    The grid nearest to the number of tokens, each side being rounded up or down from the image's own proportions.

    Args:
        size: width and height of the image in pixels.
        patches: the image processor.
        goal: what it is to have of the tokens that the processor gives it.

    Raises:
        InputError: the processor takes no image of that size.
    """
    tokens = patches.tokens(size)
    wanted = max(1, min(goal(tokens), tokens))
    if wanted == tokens == patches.without_floor().tokens(size):
        return None
    width, height = size
    across = min(max(1.0, sqrt(wanted * width / height)), wanted)  # an image of one row, or of one column, at most
    columns, rows = {floor(across), ceil(across)}, {floor(wanted / across), ceil(wanted / across)}
    grids = [(c, r) for c in sorted(columns) for r in sorted(rows) if c * r <= tokens]

    def off(grid: tuple[int, int]) -> tuple[int, float]:
        stretched = grid[0] * height / (grid[1] * width)
        return abs(grid[0] * grid[1] - wanted), max(stretched, 1 / stretched)

    chosen = min(grids, key=off)
    return chosen[0] * patches.unit, chosen[1] * patches.unit


def resize_image(image: Image.Image, patches: PatchProcessor, goal: Goal) -> Image.Image:
    """An image at the size of `resized_size`; itself where it stays as it is."""
    size = resized_size(image.size, patches, goal)
    return image if size is None or size == image.size else image.resize(size, Image.Resampling(patches.resample))


def resizing_processor(processor: Any, goal: Goal) -> Any:
    """A copy of a processor that resizes every image before it does what it always does.

    Its lower limit of pixels is lifted: it would make the images large again.

    Args:
        processor: of a model whose tokens follow an image's size.
        goal: what an image is to have of the tokens that the processor gives it.

    Raises:
        InputError: the processor is of another kind.
    """
    patches = patch_processor(processor)
    if patches is None:
        raise InputError(
            f"resize: the image processor of {type(processor).__name__} is not known to give an image as many tokens "
            "as its size has; resize the images yourself, and leave `resize` out of the spec."
        )
    return with_image_processor(processor, _ResizingImages(patches, goal))


class _ResizingImages:
    """Stands in front of an image processor; everything but the images is the processor's own."""

    def __init__(self, patches: PatchProcessor, goal: Goal) -> None:
        self._patches, self._goal = patches, goal
        self._inner = patches.without_floor().inner

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """As of the image processor."""
        return self._inner(self._resized(images), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _resized(self, images: Any) -> Any:
        if isinstance(images, list | tuple):
            return [self._resized(one) for one in images]
        if not isinstance(images, Image.Image):
            raise InputError(
                f"resize: found an image as {type(images).__name__}; give the processor PIL images (trio's own "
                "commands do)."
            )
        return resize_image(images, self._patches, self._goal)
