"""Bipartite soft matching of Token Merging (arXiv 2210.09461, section 3), batched: pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.ops import unit_length


@dataclass(frozen=True)
class Matching:
    """Which rows go into which, for B inputs of S rows each; r rows of each go away and m = S - r remain.

    Attributes:
        kept: int64 ``(B, m)``, the rows that remain, in their new order.
        moved: int64 ``(B, r)``, the rows that go away.
        into: int64 ``(B, S)``, for each row the one of the m that it is in.
    """

    kept: torch.Tensor
    moved: torch.Tensor
    into: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the rows that become one: ``(B, S, D) -> (B, m, D)``.

        The rows that move are added by a product with a small matrix: unlike a scatter, it comes out the same each time
        on a GPU.
        """
        target = self.into.gather(1, self.moved)  # (B, r)
        matrix = target[:, None] == torch.arange(self.kept.shape[1], device=target.device)[:, None]
        return rows(values, self.kept) + matrix.to(values.dtype) @ rows(values, self.moved)

    def mean(self, values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Means weighted by size, in the dtype of `values`: ``(B, S, D)`` and float32 ``(B, S)`` give ``(B, m, D)``."""
        weights = sizes[..., None]
        return (self.sums(values.float() * weights) / self.sums(weights)).to(values.dtype)


def rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``(B, k)`` of ``(B, S, D)``: ``(B, k, D)``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def match(metric: torch.Tensor, r: int, prefix: int = 0) -> Matching:
    """Pairs the r most similar rows of every second one with one of the others.

    Rows are split into two sets by turns. Every row of the first set looks for the most similar one of the second
    (cosine; ties to the lower index), and the r rows with the best of these go into theirs. Several may go into one.

    Args:
        metric: ``(B, S, D)``, what rows are compared by.
        r: rows that go away, at most half of those behind the prefix (more are not taken).
        prefix: rows at the start that neither move nor receive (class token, registers).

    Returns:
        The matching; rows that remain come in the order prefix, first set, second set, each in its own order.
    """
    batch, count, _ = metric.shape
    device = metric.device
    r = max(0, min(r, (count - prefix) // 2))
    unit = unit_length(metric)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, : (prefix + 1) // 2] = float("-inf")
    scores[:, :, : prefix // 2] = float("-inf")
    best, partner = scores.max(-1)
    first = best.sort(dim=1, descending=True, stable=True).indices[:, :r]
    moved, target = 2 * first, 2 * partner.gather(1, first) + 1
    place = torch.arange(count, device=device)
    # Prefix, first set, second set, and last what goes away.
    order = torch.where(place < prefix, place, place + count * (1 + place % 2)).expand(batch, -1)
    order = order.scatter(1, moved, order.gather(1, moved) + 3 * count).argsort(1)
    into = torch.empty_like(order).scatter(1, order, place.expand(batch, -1))
    into = into.scatter(1, moved, into.gather(1, target))
    return Matching(order[:, : count - r], moved, into)
