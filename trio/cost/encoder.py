"""FLOPs of what a compressor reads off the vision tower, and of a tower that merges tokens. Softmax is not counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core.flops import product
from ..core.shape import TowerShape
from ..core.tokens import Signal


def reading_flops(
    tower: TowerShape, tokens: int, signals: Sequence[Signal], keep: Callable[[int], int | None] | None = None
) -> int:
    """The attention that is read for an image of `tokens` visual tokens, and the comparisons of what merges inside.

    Queries, keys and hidden states are the tower's own and cost nothing. With a class token one row of scores is
    computed for each crop; without one all rows are, in blocks. Where tokens merge, the keys of every second row (their
    mean over heads) meet those of the others, in each layer that merges.

    Args:
        tower: the tower.
        tokens: visual tokens.
        signals: what is read.
        keep: as of `rows_by_layer`.
    """
    crops, patches = tower.crops(tokens)
    columns = patches + tower.prefix
    rows = 1 if tower.cls_tokens else columns
    read = sum(signal.kind == "attention" for signal in signals)
    compared = sum(
        product((before + 1) // 2, tower.hidden // tower.heads, before // 2)
        for before, after in rows_by_layer(tower, signals, keep)
        if after < before and tower.heads
    )
    return crops * (read * product(rows, tower.hidden, columns) + compared)


def rows_by_layer(
    tower: TowerShape, signals: Sequence[Signal], keep: Callable[[int], int | None] | None
) -> list[tuple[int, int]]:
    """The rows of one crop at the attention and at the feed-forward layer of each layer that merges tokens (`groups`).

    What is to go is spread evenly over these layers; one gives away at most half of its patches, and later ones make up
    for it.

    Args:
        tower: the tower, every crop of one size.
        signals: what is read.
        keep: how many of the patches of a crop are to be left; None: all, where no signal says how many merge.
    """
    merging = [signal for signal in signals if signal.kind == "groups"]
    if not merging or tower.crop_patches is None:
        return []
    patches, layers = tower.crop_patches, merging[0].layer % tower.layers + 1
    if merging[0].merges is not None:
        goal = max(1, patches - merging[0].merges * layers)
    else:
        count = None if keep is None else keep(patches)
        goal = patches if count is None else min(max(1, count), patches)
    rows, remaining = [], patches
    for layer in range(layers):
        target = patches - (patches - goal) * (layer + 1) // layers
        after = max(target, remaining - remaining // 2)
        rows.append((remaining + tower.prefix, min(remaining, after) + tower.prefix))
        remaining = min(remaining, after)
    return rows
