"""Similarities of all pairs in blocks of rows: what a method needs of them, without holding them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: What the float32 similarities of a block may take on an accelerator, where few large blocks are few launches. On the
#: CPU they take as much as the features.
BLOCK_BYTES = 2**28
#: Rows of a block at least.
FEWEST_ROWS = 64


def row_blocks(features: torch.Tensor, rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix ``(G, rows, columns)``, of which one block is made at a time.

    Args:
        features: ``(G, N, D)``, what it is made of.
        rows: all together.
        columns: of each.
    """
    size = max(FEWEST_ROWS, block_bytes(features) // max(1, 4 * len(features) * columns))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def block_bytes(features: torch.Tensor) -> int:
    """What a block of similarities of features ``(G, N, D)`` may take in float32."""
    return 4 * features.numel() if features.device.type == "cpu" else BLOCK_BYTES
