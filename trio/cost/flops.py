"""Formulas: floating-point operations of each part of a vision-language model, in closed form.

Conventions. One multiply-add is 2 FLOPs. Matrix products and convolutions are counted, nothing else (no norms, softmax,
activations, rotations, biases, look-ups, sampling): what `torch.utils.flop_counter.FlopCounterMode` counts, so that the
two can be compared. `attention="dense"` counts every query-key pair, as that counter does for every attention kernel
and as eager attention computes; `"causal"` counts the pairs that a causal mask leaves, as a flash kernel computes.
All arguments are counts of rows; all results are whole numbers of FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from ..core.flops import (
    attend,
    head_flops,
    keys_flops,
    last_row_flops,
    probe_flops,
    product,
    projector_flops,
    rows_flops,
    similarity_flops,
)
from ..core.shape import ModelShape, TowerShape

__all__ = [
    "Attention",
    "decode_flops",
    "head_flops",
    "keys_flops",
    "last_row_flops",
    "layer_flops",
    "paper_flops",
    "prefill_flops",
    "probe_flops",
    "projector_flops",
    "rows_flops",
    "similarity_flops",
    "tower_flops",
]

Attention = Literal["dense", "causal"]


def tower_flops(tower: TowerShape | None, tokens: int, merged: Sequence[tuple[int, int]] = ()) -> int:
    """The vision tower on one image that gives `tokens` visual tokens: patch embedding, all layers, pooling head.

    Args:
        tower: the tower; None costs nothing.
        tokens: visual tokens.
        merged: the rows of each of the first layers, at its attention and at its feed-forward layer, where tokens are
            merged between the two (`trio.cost.encoder.rows_by_layer`).
    """
    if tower is None:
        return 0
    crops, patches = tower.crops(tokens)
    rows, width = patches + tower.prefix, tower.hidden
    matrices = 3 if tower.gated else 2
    layer = 4 * product(rows, width, width) + matrices * product(rows, width, tower.intermediate)
    windowed = tower.layers - tower.full_attention_layers if tower.window else 0
    pairs = (tower.layers - windowed) * rows * rows + windowed * rows * min(rows, tower.window or rows)
    total = product(patches, tower.patch_values, width) + tower.layers * layer + attend(pairs, width)
    if tower.pooling_head:  # one learnt query over all rows, then a feed-forward layer on it
        total += 2 * product(1, width, width) + 2 * product(rows, width, width) + attend(rows, width)
        total += 2 * product(1, width, tower.intermediate)
    for attending, following in merged:
        total -= 4 * product(rows - attending, width, width) + attend(rows**2 - attending**2, width)
        total -= matrices * product(rows - following, width, tower.intermediate)
    return crops * total


def layer_flops(shape: ModelShape, rows: int, past: int = 0, *, attention: Attention = "dense") -> int:
    """One decoder layer on `rows` new rows that follow `past` cached ones."""
    pairs = rows * (past + rows) if attention == "dense" else rows * past + rows * (rows + 1) // 2
    return rows_flops(shape, rows) + 2 * keys_flops(shape, rows) + attend(pairs, shape.heads * shape.head_dim)


def prefill_flops(
    shape: ModelShape, rows_by_layer: Sequence[int], *, head_rows: int = 1, attention: Attention = "dense"
) -> int:
    """The decoder on a prompt, `rows_by_layer[l]` rows in layer l, and the head on `head_rows` (`generate`: 1)."""
    layers = sum(layer_flops(shape, rows, attention=attention) for rows in rows_by_layer)
    return layers + head_flops(shape, head_rows)


def decode_flops(shape: ModelShape, cached_by_layer: Iterable[int], steps: int) -> int:
    """`steps` cached decode steps of one row each; layer l holds `cached_by_layer[l]` rows before the first."""
    width, total = shape.heads * shape.head_dim, 0
    for cached in cached_by_layer:
        total += steps * (rows_flops(shape, 1) + 2 * keys_flops(shape, 1))
        total += attend(steps * cached + steps * (steps + 1) // 2, width)  # step t sees cached + t keys
    return total + steps * head_flops(shape, 1)


def paper_flops(visual_by_layer: Iterable[int], hidden: int, intermediate: int) -> int:
    """FastV's formula, for comparison with papers only: sum over layers of 4nd^2 + 2n^2 d + 2ndm.

    It counts multiply-adds (not FLOPs) of the visual tokens only, and of two of the three feed-forward matrices; no
    text, head, tower, projector or scoring (arXiv 2403.06764, section 4; used by arXiv 2602.04657, table of costs).

    Args:
        visual_by_layer: visual tokens n of each layer.
        hidden: width d.
        intermediate: width m of the feed-forward layer.
    """
    return sum(4 * n * hidden**2 + 2 * n**2 * hidden + 2 * n * hidden * intermediate for n in visual_by_layer)
