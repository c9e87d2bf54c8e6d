"""Attention that compressors read, from queries and keys alone: never a whole matrix of all heads at once."""

from __future__ import annotations

import torch


def class_row(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention of one query to all keys, mean over heads.

    Args:
        queries: ``(heads, head_dim)``.
        keys: ``(S, heads, head_dim)``.
        scale: what products are multiplied with.

    Returns:
        float32 ``(S,)``, sum 1.
    """
    scores = torch.einsum("hd,shd->hs", queries.float(), keys.float()) * scale
    return scores.softmax(-1).mean(0)


def received(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention that each key receives, mean over heads and queries.

    Queries are taken in blocks so small that a block's scores are no larger than the keys; each block is normalised by
    itself, as a row of the softmax needs nothing but its own row.

    Args:
        queries: ``(Q, heads, head_dim)``.
        keys: ``(S, heads, head_dim)``.
        scale: what products are multiplied with.

    Returns:
        float32 ``(S,)``, sum 1.
    """
    q, heads, size = queries.shape
    by_head = keys.float().permute(1, 2, 0)  # (heads, head_dim, S), a view
    total = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device)
    for start in range(0, q, size):
        block = queries[start : start + size].float().transpose(0, 1) * scale
        scores = block @ by_head  # (heads, block, S)
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        weights = scores.sum(-1).reciprocal()
        total += weights.flatten() @ scores.flatten(0, 1)
    return total / (q * heads)


def as_one_head(heads: torch.Tensor) -> torch.Tensor:
    """``(..., heads, head_dim)`` as a single head of full width, ``(..., 1, heads * head_dim)``."""
    return heads.flatten(-2).unsqueeze(-2)
