"""Token Merging: similar tokens become one in every block of the tower (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from ...core.flops import feature_width, product, reprojected_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.tokens import Signal
from ..reading.batched import first_of, merge, per_input, slots
from ..reading.blocks import row_blocks
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("tome")
class ToMe(BatchCompressor):
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

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        (signal,) = self.reads()
        leads, into = grouped(batch.signals[signal], batch.valid, k)
        # How many groups the tower made is the one thing that the host does not know.
        counts: list[int] = leads.sum(1).tolist()
        out = merge(batch, leads, into, counts)
        while any(count > wanted for count, wanted in zip(out.counts, k, strict=True)):
            gone = [min(count - wanted, count // 2) for count, wanted in zip(out.counts, k, strict=True)]
            leads, into = paired(out, gone)
            out = merge(out, leads, into, [count - moved for count, moved in zip(out.counts, gone, strict=True)])
        every = torch.arange(out.features.shape[1], device=into.device).expand(len(k), -1)
        return replace(out, signals={signal: every})

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


def grouped(groups: torch.Tensor, valid: torch.Tensor, k: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups as leaders and members; where there are fewer than k, the largest ones are split until there are k.

    Args:
        groups: int64 ``(G, N)``, tokens of a group have the same number, 0 or more.
        valid: bool ``(G, N)``.
        k: for each input, at most its tokens.

    Returns:
        bool ``(G, N)``, True at the first token of each group, k or more of each input; int64 ``(G, N)``, for each
        token the place of its group among them, -1 at padding.
    """
    n, device = groups.shape[1], groups.device
    every = torch.arange(n, device=device)
    ordered, tokens = groups.masked_fill(~valid, torch.iinfo(torch.int64).max).sort(dim=1, stable=True)
    begin, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    own = torch.empty_like(tokens).scatter_(1, tokens, tokens.gather(1, begin))  # each group's first
    sizes = torch.empty_like(tokens).scatter_(1, tokens, end - begin)
    leads = (own == every) & valid
    (wanted,) = per_input(device, k)
    missing = wanted - leads.sum(1, keepdim=True)
    # Large groups first, within one in raster order; a token that leads nothing yet becomes one of its own.
    order = (sizes * n - every).masked_fill_(leads | ~valid, -n).sort(dim=1, descending=True, stable=True).indices
    leads |= first_of(order, missing)
    place = slots(leads)
    return leads, torch.where(leads, place, place.gather(1, own)).masked_fill_(~valid, -1)


def paired(batch: TokenBatch, r: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs the most similar of every second token with one of the others, as `trio.encoders.reading.matching.match`.

    All pairs of the two halves are compared, which is the method itself and takes O(N^2) time; memory is O(N) beyond
    one block.

    Args:
        batch: the tokens; they are compared by their features.
        r: tokens of each input that go into another one, at most half of its own.

    Returns:
        bool ``(G, N)``, True at tokens that remain; int64 ``(G, N)``, for each token the place of its own among them,
        -1 at padding.
    """
    unit, valid = unit_length(batch.features), batch.valid
    a, b, absent = unit[:, ::2], unit[:, 1::2].transpose(1, 2), ~valid[:, None, 1::2]
    found = [
        (a[:, block] @ b).masked_fill_(absent, float("-inf")).max(2)
        for block in row_blocks(unit, a.shape[1], b.shape[2])
    ]
    best, partner = torch.cat([one.values for one in found], 1), torch.cat([one.indices for one in found], 1)
    order = best.masked_fill_(~valid[:, ::2], float("-inf")).sort(dim=1, descending=True, stable=True).indices
    (gone,) = per_input(order.device, r)
    target = torch.arange(valid.shape[1], device=order.device).repeat(len(r), 1)
    moved = torch.zeros_like(valid)
    moved[:, ::2] = first_of(order, gone)
    target[:, ::2] = torch.where(moved[:, ::2], 2 * partner + 1, target[:, ::2])
    remain = valid & ~moved
    return remain, slots(remain).gather(1, target).masked_fill_(~valid, -1)
