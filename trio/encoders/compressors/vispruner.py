"""VisPruner: important tokens by attention, diverse ones by taking duplicates away (arXiv 2412.01818)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ...core.flops import feature_width, product
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.tokens import Signal, VisualTokens
from ..reading.merge import keep, patches_only, ranking
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("vispruner")
class VisPruner(Compressor):
    """Important tokens by attention, diverse ones of the rest by removing duplicates (VisPruner, arXiv 2412.01818).

    Important tokens are those with the highest attention from the class token (in towers without one: received by all
    patches). The rest, by falling attention, is split again and again into every other token (a) and those between (b);
    each time the tokens of a that are most cosine-similar to one of b are removed, until the number asked for is left.
    Removed tokens are dropped.

    Parameters:
        important: share of the k tokens that is important, rounded down (published: 0.5).
        remove: how many tokens are removed at a time (published: 8).
        layer: block of the tower for attention (published: -2).
    """

    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    remove: Annotated[int, Field(ge=1)] = 8
    layer: int = -2

    def reads(self) -> tuple[Signal, ...]:
        """Attention of one block."""
        return (Signal("attention", self.layer),)

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        order = ranking(tokens.signals[self.reads()[0]])
        important = int(k * self.important)
        diverse = distinct(unit_length(tokens.features), order[important:], k - important, self.remove)
        return keep(tokens, torch.cat([order[:important], diverse]).sort().values)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of one half of the tokens left with the other, each time that some are removed."""
        important = int(keep * self.important)
        diverse, left, total = keep - important, visual - important, 0
        while diverse and left > diverse:
            half = (left + 1) // 2
            total += product(half, feature_width(shape), left - half)
            left -= min(self.remove, left - diverse, half)
        return total


def distinct(unit: torch.Tensor, tokens: torch.Tensor, k: int, remove: int) -> torch.Tensor:
    """Takes duplicates away until k tokens are left.

    Args:
        unit: ``(n, D)`` of length 1.
        tokens: int64 ``(m,)``, indices of the n.
        k: from 0 to m.
        remove: how many to remove at a time.

    Returns:
        int64 ``(k,)``, some of `tokens`.
    """
    if not k:
        return tokens[:0]
    while (count := min(remove, len(tokens) - k)) > 0:
        a, b = tokens[::2], tokens[1::2]
        likeness = (unit[a] @ unit[b].T).amax(1)
        tokens = torch.cat([a[ranking(likeness)[count:]], b])
    return tokens
