"""DivPrune: tokens as far from each other as possible (arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...core.flops import similarity_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch, first
from ..reading.batched import keep
from .base import COMPRESSORS, BatchCompressor, Space


@COMPRESSORS.register("divprune")
class DivPrune(BatchCompressor):
    """Max-min diversity, greedy (DivPrune, arXiv 2503.02175): no saliency, nothing read off the tower.

    Distance is one minus the cosine similarity of features as they enter the language model. The first token is the one
    whose nearest other token is farthest; each next one is the token farthest from the nearest token kept (ties: lower
    index). The others are dropped. The published code may pick a token twice where all that is left equals kept tokens;
    here k different ones are kept.
    """

    space: ClassVar[Space] = "language"

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        order = farthest(batch.features, batch.valid, max(k))
        width = batch.features.shape[1]
        order = order.masked_fill(~first(k, order.shape[1], order.device), width)
        chosen = batch.valid.new_zeros(len(k), width + 1).scatter_(1, order, True)
        return keep(batch, chosen[:, :width], k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all pairs."""
        return similarity_flops(shape, visual, visual)


def farthest(features: torch.Tensor, valid: torch.Tensor, k: int) -> torch.Tensor:
    """k tokens of each input, each the farthest from those before it.

    Args:
        features: ``(G, N, D)``.
        valid: bool ``(G, N)``.
        k: from 1 to N; inputs of fewer tokens have others behind theirs.

    Returns:
        int64 ``(G, k)``, in the order in which they were chosen.
    """
    unit = unit_length(features)
    distance = 1.0 - unit @ unit.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    distance.masked_fill_(~valid[:, None], float("inf"))
    lowest = float("-inf")
    chosen = [distance.amin(2).masked_fill_(~valid, lowest).argmax(1, keepdim=True)]  # nothing waits for it
    near = torch.full_like(valid, float("inf"), dtype=torch.float32).masked_fill_(~valid, lowest)
    for _ in range(k - 1):
        own = distance.gather(1, chosen[-1][..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        near = torch.minimum(near, own).scatter_(1, chosen[-1], lowest)
        chosen.append(near.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)
