"""PruMerge: outliers of the attention as centres of clusters (arXiv 2403.15388)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ...core.flops import feature_width, product, reprojected_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.tokens import Signal, VisualTokens
from ..reading.merge import leaders_lead, merge, patches_only, ranking
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("prumerge")
class PruMerge(Compressor):
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

    plus: bool = False
    neighbours: Annotated[int, Field(ge=1)] = 32
    rest: bool = True
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    layer: int = -1
    heads: Literal["one", "mean"] = "one"

    def reads(self) -> tuple[Signal, ...]:
        """Attention and keys of one block."""
        return Signal("attention", self.layer, self.heads), Signal("keys", self.layer)

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`; `k` plays no role."""
        attention, keys = (tokens.signals[signal] for signal in self.reads())
        n = len(attention)
        found = outliers(attention) if self.share is None else int(n * self.share)
        centres = ranking(attention)[: max(1, found)]
        if self.plus:
            centres = torch.cat([centres, evenly(n, len(centres), attention.device)])
            centres = torch.zeros_like(attention).index_fill(0, centres, 1.0).nonzero().squeeze(1)
        clusters, nearest = neighbourhoods(unit_length(keys.flatten(1)), centres, self.neighbours)
        weights = attention * tokens.sizes
        values = tokens.features.float()
        features = values[centres] + (clusters * weights) @ values
        others = torch.ones_like(attention, dtype=torch.bool).index_fill(0, centres, False)
        if self.rest and len(centres) < n:
            lead = attention.masked_fill(~others, float("-inf")).argmax()[None]
            features = torch.cat([features, ((weights * others) @ values)[None]])
            nearest = torch.where(nearest < 0, len(centres), nearest)
            centres = torch.cat([centres, lead])
        leaders, order = centres.sort()
        into = torch.where(nearest < 0, -1, order.argsort()[nearest.clamp_min(0)])
        return merge(tokens, leaders, leaders_lead(into, leaders), features[order].to(tokens.features.dtype))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Keys of the centres against all keys, one sum over all tokens for each token left, and these projected."""
        centres = max(1, keep - self.rest)
        width = shape.hidden if shape.tower is None else shape.tower.hidden
        sums = product(keep, visual, feature_width(shape))
        return product(centres, width, visual) + sums + reprojected_flops(shape, keep)


def outliers(attention: torch.Tensor) -> int:
    """How many of float32 ``(n,)`` are more than 1.5 interquartile ranges above the third quartile."""
    first, third = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device)).unbind()
    return int((attention > third + 1.5 * (third - first)).sum())


def evenly(n: int, centres: int, device: torch.device) -> torch.Tensor:
    """Every (n / centres / 3)-th of n tokens, rounded down at each division, the last token left out; int64."""
    return torch.arange(0, n - 1, max(1, n // centres // 3), device=device)


def neighbourhoods(unit: torch.Tensor, centres: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens nearest to each centre.

    Args:
        unit: ``(n, D)`` of length 1.
        centres: int64 ``(c,)``.
        count: how many for each centre, the centre itself left out; all others where there are fewer.

    Returns:
        float32 ``(c, n)``, 1 at the tokens of each centre; int64 ``(n,)``, for each token the most similar one of the
        centres among whose tokens it is, -1 for none.
    """
    similarity = (unit[centres] @ unit.T).scatter(1, centres[:, None], float("-inf"))
    chosen = similarity.sort(dim=1, descending=True, stable=True).indices[:, : min(count, unit.shape[0] - 1)]
    inside = torch.zeros_like(similarity).scatter(1, chosen, 1.0)
    best, nearest = similarity.masked_fill(inside == 0, float("-inf")).max(0)
    return inside, torch.where(best == float("-inf"), -1, nearest)
