"""PruMerge: outliers of the attention as centres of clusters (arXiv 2403.15388)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ...core.flops import feature_width, product, reprojected_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch, first
from ...core.tokens import Signal
from ...core.transfer import upload
from ..reading.batched import first_of, in_order, merge, per_input, ranking, rows, slots
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("prumerge")
class PruMerge(BatchCompressor):
    """Outliers of the attention gather the tokens around them; decides its own count (PruMerge, arXiv 2403.15388).

    Centres are the tokens whose attention from the class token (in towers without one: received by all patches) is
    more than 1.5 interquartile ranges above the third quartile; at least one. To each centre its nearest tokens by
    key (cosine over all heads) are added, each times its attention, other centres included. One more token is the
    sum of all that are not centres, each times its attention; it stands at the place of the one with the highest
    attention. A token may be in several clusters: the merge map names the centre with the most similar key among
    them, and the one more token for those that are in none. The published order is by falling attention; here it is
    raster order.

    Parameters:
        plus: whether tokens spread evenly become centres too (PruMerge+): every (n / outliers / 3)-th.
        neighbours: tokens added to each centre (published: 32).
        rest: whether the one more token is made (as published); without it tokens in no cluster are dropped.
        share: a share of the tokens as outliers, in place of what the quartiles say (the published code's fixed ratio).
        layer: block of the tower for attention and keys (published code: -1, the last).
        heads: ``"one"`` takes the softmax as if there were a single head of full width, as the published code does;
            ``"mean"`` is the mean of the tower's own heads.
    """

    decides_count: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True  # a centre's neighbours may all be, in the merge map, with another centre

    plus: bool = False
    neighbours: Annotated[int, Field(ge=1)] = 32
    rest: bool = True
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    layer: int = -1
    heads: Literal["one", "mean"] = "one"

    def reads(self) -> tuple[Signal, ...]:
        """Attention and keys of one block."""
        return Signal("attention", self.layer, self.heads), Signal("keys", self.layer)

    def decided_count(self, tokens: int) -> int | None:
        """See `Compressor.decided_count`: known of a share that nothing is added to."""
        if self.share is None or self.plus:
            return None
        centres = self._outliers_of(self.share, tokens)
        return centres + (self.rest and centres < tokens)

    @staticmethod
    def _outliers_of(share: float, tokens: int) -> int:
        return max(1, int(tokens * share))

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`; `k` plays no role."""
        attention, keys = (batch.signals[signal] for signal in self.reads())
        valid, device, width = batch.valid, attention.device, attention.shape[1]
        (n,) = per_input(device, batch.counts)
        centres = self._centres(attention, valid, n, batch.counts)
        counts: list[int] = centres.sum(1).tolist()  # the one thing that the host does not know
        index, exist = in_order(centres, max(counts)), first(counts, max(counts), device)
        clusters, nearest = neighbourhoods(
            unit_length(keys.flatten(2)), valid, index, exist, [min(self.neighbours, own - 1) for own in batch.counts]
        )
        weights = attention * batch.sizes
        values = batch.features.float().masked_fill(~valid[..., None], 0.0)
        chosen, features = centres, rows(values, index) + (clusters * weights[:, None]) @ values
        into = torch.where(nearest < 0, -1, nearest)
        if self.rest:
            others = valid & ~centres
            lead = first_of(ranking(attention, others), others.any(1, keepdim=True))
            chosen = centres | lead
            counts = [count + (count < own) for count, own in zip(counts, batch.counts, strict=True)]
            together = (weights * others)[:, None] @ values
            # In raster order: what stands behind the one more token moves by one.
            place, behind = slots(chosen), slots(lead) >= 0
            at = lead.int().argmax(1, keepdim=True)
            slot = place.gather(1, at).masked_fill_(~lead.any(1, keepdim=True), width)  # of the one more token
            number = torch.arange(max(counts), device=device)
            before = number - (number > slot).long()
            features = torch.where(
                (number == slot)[..., None], together, rows(features, before.clamp_(0, features.shape[1] - 1))
            )
            moved = nearest + behind.gather(1, index).gather(1, nearest.clamp_min(0)).long()
            into = torch.where(nearest < 0, slot, moved)
        return merge(batch, chosen, into.masked_fill(~valid, -1), counts, features.to(batch.features.dtype))

    def _centres(
        self, attention: torch.Tensor, valid: torch.Tensor, n: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """bool ``(G, N)``: outliers of the attention, and tokens spread evenly where asked for."""
        if self.share is None:
            found = outliers(attention, valid, counts).clamp_min(1)
        else:
            (found,) = per_input(attention.device, [self._outliers_of(self.share, count) for count in counts])
        centres = first_of(ranking(attention, valid), found)
        if self.plus:
            place = torch.arange(attention.shape[1], device=attention.device)
            # Every (n / centres / 3)-th, rounded down at each division, the last token left out.
            step = (n // found // 3).clamp_min(1)
            centres |= (place % step == 0) & (place < n - 1)
        return centres

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Keys of the centres against all keys, one sum over all tokens for each token left, and these projected."""
        centres = max(1, keep - self.rest)
        width = shape.hidden if shape.tower is None else shape.tower.hidden
        sums = product(keep, visual, feature_width(shape))
        return product(centres, width, visual) + sums + reprojected_flops(shape, keep)


def outliers(attention: torch.Tensor, valid: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """How many of float32 ``(G, N)`` are more than 1.5 interquartile ranges above the third quartile: ``(G, 1)``.

    Quartiles are linear between neighbours, as `torch.quantile`'s.
    """
    ordered = attention.masked_fill(~valid, float("inf")).sort(dim=1).values
    # A quartile q of n values stands at q (n - 1) / 4.
    places = [[q * (count - 1) for q in (1, 3)] for count in counts]
    quarters = upload(torch.tensor(places), attention.device)  # (G, 2)
    below = ordered.gather(1, quarters // 4)
    above = ordered.gather(1, (quarters + 3) // 4)
    quartiles = below.lerp(above, (quarters % 4).float() / 4)
    first, third = quartiles[:, :1], quartiles[:, 1:]
    return ((attention > third + 1.5 * (third - first)) & valid).sum(1, keepdim=True)


def neighbourhoods(
    unit: torch.Tensor, valid: torch.Tensor, centres: torch.Tensor, exist: torch.Tensor, counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens nearest to each centre.

    Args:
        unit: ``(G, N, D)`` of length 1.
        valid: bool ``(G, N)``.
        centres: int64 ``(G, C)``.
        exist: bool ``(G, C)``.
        counts: how many for each centre of an input, the centre itself left out; less than the input's tokens.

    Returns:
        float32 ``(G, C, N)``, 1 at the tokens of each centre; int64 ``(G, N)``, for each token the most similar one of
        the centres among whose tokens it is, -1 for none.
    """
    lowest = float("-inf")
    similarity = (rows(unit, centres) @ unit.transpose(1, 2)).scatter(2, centres[..., None], lowest)
    similarity = similarity.masked_fill_(~valid[:, None], lowest)
    most = max(counts)
    if not most:
        return torch.zeros_like(similarity), torch.full_like(valid, -1, dtype=torch.int64)
    chosen = similarity.sort(dim=2, descending=True, stable=True).indices[..., :most]
    inside = torch.zeros_like(similarity).scatter_(
        2, chosen, (first(counts, most, unit.device)[:, None] & exist[..., None]).float()
    )
    best, nearest = similarity.masked_fill(inside == 0, lowest).max(1)
    return inside, torch.where(best == lowest, -1, nearest)
