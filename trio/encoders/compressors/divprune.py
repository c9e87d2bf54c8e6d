"""DivPrune: tokens as far from each other as possible (arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from ...core.flops import similarity_flops
from ...core.greedy import exact_products, most_distant
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.transfer import upload
from ..reading.batched import keep
from ..reading.blocks import row_blocks
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
        return keep(batch, farthest(batch.features, batch.valid, k), k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all pairs."""
        return similarity_flops(shape, visual, visual)


def farthest(features: torch.Tensor, valid: torch.Tensor, k: Sequence[int]) -> torch.Tensor:
    """k tokens of each input, each the farthest from those before it.

    The first one is the one whose nearest other token is farthest, for which all pairs are compared once: O(N^2) time
    is the method itself, the others take O(k N). Similarities are held where one block has all of them; elsewhere rows
    of them are computed as needed, in O(N) memory beyond one block.

    Args:
        features: ``(G, N, D)``.
        valid: bool ``(G, N)``.
        k: for each input, from 1 to its tokens.

    Returns:
        bool ``(G, N)``, True at the tokens chosen.
    """
    groups, tokens, _ = features.shape
    unit = unit_length(features)
    columns = unit.transpose(1, 2)
    group = torch.arange(groups, device=unit.device)[:, None]
    blocks = list(row_blocks(unit, tokens, tokens))
    similarity, nearest = unit, list[torch.Tensor]()
    with exact_products():
        for block in blocks:
            similarity = unit[:, block] @ columns
            others = similarity.masked_fill(~valid[:, None], float("-inf"))
            others.diagonal(block.start, 1, 2).fill_(float("-inf"))
            nearest.append(others.amax(2))
        whole = similarity if len(blocks) == 1 else None

        def distances(index: torch.Tensor, to: Literal["all", "among"]) -> torch.Tensor:
            similarity = unit[group, index] @ columns if whole is None else whole[group, index]
            if to == "among":
                similarity = similarity.gather(2, index[:, None].expand(-1, index.shape[1], -1))
            return similarity.neg().add_(1.0).clamp_min_(0.0)  # rounding may bring it below 0

        # The one whose nearest other token is farthest comes first: of all weights, 1, its own is the largest.
        leader = torch.cat(nearest, 1).masked_fill_(~valid, float("inf")).argmin(1, keepdim=True)
        weights = torch.ones_like(valid, dtype=torch.float32).scatter_(1, leader, 2.0)
        return upload(torch.from_numpy(most_distant(weights, valid, k, distances).kept), valid.device)
