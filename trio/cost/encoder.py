"""FLOPs of the encoder side: what is read off the tower, and a compressor's own arithmetic. Softmax is not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .flops import projector_flops
from .shape import ModelShape, TowerShape

if TYPE_CHECKING:
    from ..encoders.compressors.base import Compressor


def reading_flops(tower: TowerShape, tokens: int, compressor: Compressor) -> int:
    """The attention that a compressor reads for a picture of `tokens` visual tokens.

    Queries, keys and hidden states are the tower's own and cost nothing. With a class token one row of scores is
    computed for each crop; without one all rows are, in blocks.
    """
    crops, patches = tower.crops(tokens)
    rows = 1 if tower.cls_tokens else patches
    read = sum(signal.kind == "attention" for signal in compressor.reads())
    return 2 * read * crops * rows * (patches + tower.cls_tokens) * tower.hidden


def compressor_flops(
    shape: ModelShape, tokens: int, keep: int, compressor: Compressor, name: str | None
) -> tuple[int, bool]:
    """A compressor's own products on a picture, and whether they are known.

    Args:
        shape: of the model.
        tokens: visual tokens of the picture (or tile).
        keep: tokens that it leaves.
        compressor: the part.
        name: its registered name.
    """
    own = getattr(compressor, "flops", None)
    if own is not None:
        return int(own(shape, tokens=tokens, visual=tokens, keep=keep)), True
    formula = _FORMULAS.get(name or "")
    return (0, False) if formula is None else (formula(shape, compressor, tokens, keep), True)


def _visionzip(shape: ModelShape, part: Any, tokens: int, keep: int) -> int:
    dominant: int
    contextual: int
    dominant, contextual = part.split(keep)
    width = shape.tower.hidden if shape.tower is not None else shape.hidden  # at most: keys are averaged over heads
    rest = max(0, tokens - dominant)
    return 2 * rest * contextual * width + projector_flops(shape, contextual + 1)


_FORMULAS: dict[str, Callable[[ModelShape, Any, int, int], int]] = {
    "visionzip": _visionzip,
    "scan": lambda shape, part, tokens, keep: 2 * tokens * keep * shape.hidden,
    "divprune": lambda shape, part, tokens, keep: 2 * tokens * tokens * shape.hidden,
    "average-pool": lambda shape, part, tokens, keep: projector_flops(shape, keep),
    "uniform-grid": lambda shape, part, tokens, keep: 0,
    "random": lambda shape, part, tokens, keep: 0,
}
