"""FLOPs of what a compressor reads off the vision tower. Softmax is not counted."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.flops import product
from ..core.shape import TowerShape
from ..core.tokens import Signal


def reading_flops(tower: TowerShape, tokens: int, signals: Sequence[Signal]) -> int:
    """The attention that is read for an image of `tokens` visual tokens.

    Queries, keys and hidden states are the tower's own and cost nothing. With a class token one row of scores is
    computed for each crop; without one all rows are, in blocks.
    """
    crops, patches = tower.crops(tokens)
    rows = 1 if tower.cls_tokens else patches
    read = sum(signal.kind == "attention" for signal in signals)
    return read * crops * product(rows, tower.hidden, patches + tower.cls_tokens)
