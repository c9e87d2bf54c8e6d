"""DivPrune: tokens as far from each other as possible (arXiv 2503.02175)."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...core.flops import similarity_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.tokens import VisualTokens
from ..reading.merge import keep, patches_only
from .base import COMPRESSORS, Compressor, Space


@COMPRESSORS.register("divprune")
class DivPrune(Compressor):
    """Max-min diversity, greedy (DivPrune, arXiv 2503.02175): no saliency, nothing read off the tower.

    Distance is one minus the cosine similarity of features as they enter the language model. The first token is the one
    whose nearest other token is farthest; each next one is the token farthest from the nearest token kept (ties: lower
    index). The others are dropped. The published code may pick a token twice where all that is left equals kept tokens;
    here k different ones are kept.
    """

    space: ClassVar[Space] = "language"

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        return keep(tokens, farthest(tokens.features, k).sort().values)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all pairs."""
        return similarity_flops(shape, visual, visual)


def farthest(features: torch.Tensor, k: int) -> torch.Tensor:
    """k of n tokens, each the farthest from those before it.

    Args:
        features: ``(n, D)``.
        k: from 1 to n.

    Returns:
        int64 ``(k,)``, in the order in which they were chosen.
    """
    unit = unit_length(features)
    distance = (1.0 - unit @ unit.T).fill_diagonal_(float("inf"))
    chosen = [distance.amin(1).argmax(0, keepdim=True)]  # indices stay on the device: nothing waits for it
    near = torch.full_like(distance[0], float("inf"))
    for _ in range(k - 1):
        near = torch.minimum(near, distance.index_select(0, chosen[-1])[0]).index_fill(0, chosen[-1], float("-inf"))
        chosen.append(near.argmax(0, keepdim=True))
    return torch.cat(chosen)
