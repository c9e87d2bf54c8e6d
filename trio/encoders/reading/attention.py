"""Attention that compressors read, from queries and keys alone: never a whole matrix of all heads at once."""

from __future__ import annotations

import torch

#: What the float32 scores of a block may take on an accelerator, where few large blocks are few launches. On the CPU
#: they take as much as half the keys.
BLOCK_BYTES = 2**31


def class_row(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention of one query to all keys, mean over heads.

    Args:
        queries: ``(G, heads, head_dim)``, one for each input.
        keys: ``(G, S, heads, head_dim)``.
        scale: what products are multiplied with.

    Returns:
        float32 ``(G, S)``, sum 1 of each row.
    """
    scores = torch.einsum("ghd,gshd->ghs", queries.float(), keys.float()) * scale
    return scores.softmax(-1).mean(1)


def received(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, *, block_bytes: int | None = None
) -> torch.Tensor:
    """The attention that each key receives, mean over heads and queries.

    Queries are taken in blocks: a row of the softmax needs nothing but its own row. Products are taken in the dtype of
    queries and keys, as the tower's own attention does; the softmax and all sums are in float32.

    Args:
        queries: ``(G, Q, heads, head_dim)`` of G inputs of one length.
        keys: ``(G, S, heads, head_dim)``.
        scale: what products are multiplied with.
        block_bytes: what the float32 scores of a block may take; at least those of one query of each input and head.
            Beside them stand their softmax, and in half precision the products.

    Returns:
        float32 ``(G, S)``, sum 1 of each row.
    """
    groups, count, heads, _ = queries.shape
    length = keys.shape[1]
    if block_bytes is None:
        block_bytes = 2 * keys.numel() if keys.device.type == "cpu" else BLOCK_BYTES
    size = max(1, block_bytes // (4 * groups * heads * length))
    rows = queries.transpose(1, 2).flatten(0, 1)  # (G * heads, Q, head_dim)
    columns = keys.permute(0, 2, 3, 1).flatten(0, 1)  # (G * heads, head_dim, S)
    nothing = rows.new_zeros(1, 1, 1)
    starts = range(0, count, size)
    parts = torch.empty(len(starts), groups, length, dtype=torch.float32, device=keys.device)
    for part, start in zip(parts, starts, strict=True):
        scores = torch.baddbmm(nothing, rows[:, start : start + size], columns, beta=0, alpha=scale)
        weights = scores.softmax(-1, dtype=torch.float32)
        torch.sum(weights.view(groups, -1, length), 1, out=part)
    return parts.sum(0).div_(count * heads)


def as_one_head(heads: torch.Tensor) -> torch.Tensor:
    """``(..., heads, head_dim)`` as a single head of full width, ``(..., 1, heads * head_dim)``."""
    return heads.flatten(-2).unsqueeze(-2)
