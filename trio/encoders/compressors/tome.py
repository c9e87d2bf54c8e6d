"""Token Merging: similar tokens become one in every block of the tower (arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from ...core.flops import feature_width, product, reprojected_flops
from ...core.shape import ModelShape
from ...core.tokens import Signal, VisualTokens
from ..reading.matching import match
from ..reading.merge import merge, patches_only
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("tome")
class ToMe(Compressor):
    """Token Merging inside the vision tower (ToMe, arXiv 2210.09461): the tower itself gets cheaper.

    In every block, between attention and feed-forward layer, tokens are split into two sets by turns, the most similar
    pairs (cosine of the keys, mean over heads) are merged into means weighted by size, and attention counts each token
    with its size. The class token and registers are left alone. What is left is spread evenly over the blocks, so that
    after them the wanted number remains; groups stand at their first token's place.

    Where the number differs from the groups (a share of cropped tiles, an `r`), merging goes on after the tower by the
    features, or the largest groups keep several of their equal tokens.

    Parameters:
        r: tokens merged in each block, as in the paper; by default what it takes to leave the number wanted.
        layer: the last block that merges, from the end where negative. At most the block that the features come from.
    """

    r: Annotated[int, Field(ge=1)] | None = None
    layer: int = -2

    def reads(self) -> tuple[Signal, ...]:
        """The groups, which asks for the merging."""
        return (Signal("groups", self.layer, merges=self.r),)

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        (signal,) = self.reads()
        leaders, into = grouped(tokens.signals[signal], k)
        out = merge(tokens, leaders, into)
        while out.tokens > k:
            matching = match(out.features[None], out.tokens - k)
            order = matching.kept[0].sort()
            rank = torch.empty_like(order.indices).scatter(0, order.indices, torch.arange(len(order.indices)).to(into))
            out = merge(out, order.values, rank[matching.into[0]])
        signals = {**out.signals, signal: torch.arange(out.tokens, device=into.device)}
        return replace(out, signals=signals)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """What follows the tower: merging by features down to the number, and the tokens projected once more.

        An upper bound: groups of one token are not projected again. Merging inside the tower belongs to what `reads`
        names. Without `r` the tower leaves the number itself (except of images in several tiles, whose numbers differ).
        """
        left, total = keep if self.r is None else self._left(shape, visual), 0
        while left > keep:
            total += product((left + 1) // 2, feature_width(shape), left // 2)
            left -= min(left - keep, left // 2)
        return total + reprojected_flops(shape, keep)

    def _left(self, shape: ModelShape, visual: int) -> int:
        """Tokens that the tower leaves of an image where `r` go in each block."""
        if shape.tower is None or self.r is None:
            return visual
        crops, patches = shape.tower.crops(visual)
        blocks = self.layer % shape.tower.layers + 1
        for _ in range(blocks):
            patches = max(1, patches - min(self.r, patches // 2))
        return crops * patches


def grouped(groups: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups as leaders and members; where there are fewer than k, the largest ones are split until there are k.

    Args:
        groups: int64 ``(n,)``, tokens of a group have the same number.
        k: at most n.

    Returns:
        int64 ``(m,)``, rising, the first token of each group, m >= k; int64 ``(n,)``, the one of the m of each token.
    """
    names, into, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    n, device = len(groups), groups.device
    every = torch.arange(n, device=device)
    leads = torch.zeros(n, dtype=torch.bool, device=device)
    leads[torch.full_like(names, n).scatter_reduce(0, into, every, "amin")] = True
    missing = k - len(names)
    if missing > 0:
        # Large groups first, within one in raster order; a token that leads nothing yet becomes one of its own.
        order = (sizes[into] * n - every).masked_fill(leads, -1).sort(descending=True, stable=True).indices
        leads[order[:missing]] = True
    leaders = leads.nonzero().squeeze(1)
    own = torch.full_like(names, n).scatter_reduce(0, into, every, "amin")  # each group's first
    target = torch.where(leads, every, own[into])
    return leaders, torch.searchsorted(leaders, target)
