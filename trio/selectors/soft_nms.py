"""Soft non-maximum suppression in feature space and on the image: no threshold, no running out of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

from ..core.context import SelectionContext
from ..core.flops import similarity_flops
from ..core.ops import first_k, ranking
from ..core.part import Choice, FloatRange
from ..core.shape import ModelShape
from .base import SELECTORS, Selector
from .nms import unit_length


@SELECTORS.register("soft-nms")
class SoftNMS(Selector):
    """Greedy selection by saliency, weighed down near what is kept already.

    The next token kept is always the one with the largest ``s ** weight * d``, where s is its saliency relative to the
    group's best, and d how far it is from the nearest token kept so far: ``1 - cosine similarity + spread * k / n *
    distance on the image``, with k of n tokens to keep. The first one is the best.

    With ``spread: 0`` that is Soft-NMS (arXiv 1704.04503) with similarities of features in place of overlaps of boxes,
    and the max-min diversity of DivPrune (arXiv 2503.02175) with saliencies as weights. It is what we changed in TRIO
    (arXiv 2602.04657), whose `nms` drops duplicates at a fixed threshold. Where few tokens differ by so much, as at the
    input of a language model, that runs out of tokens early, and duplicates of the best ones fill up the budget.

    The spread is ours as well: tokens that look alike far apart are not duplicates but two things, which matters to
    whoever has to count them. It grows with the share that is kept, because few tokens have to be found by what they
    show and many have room to be found by where they are. Saliencies below 0 are shifted to begin at 0.

    Parameters:
        weight: exponent of the saliency: 0 looks at diversity alone, large values at saliency alone (top-k). 0.25 was
            chosen on the zoo's validation scenes (docs/results.md).
        spread: how much the distance on the image counts: a whole side of the image (or more, or another image)
            is worth as much as features at right angles where the spread is 1 and nearly all are kept. 0 looks at
            features alone. A token whose position is not known is near to all others. 0.7 was chosen on the
            zoo's validation scenes, where half and twice as much were not told apart from it (docs/results.md).
    """

    weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.25
    spread: Annotated[float, Field(ge=0.0, le=10.0)] = 0.7

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        order, k = ranking(ctx.saliency, ctx.valid), ctx.k
        exists = ctx.valid.gather(1, order)
        unit = unit_length(ctx.features)
        unit = unit.gather(1, order[..., None].expand_as(unit))
        distance = (unit @ unit.transpose(1, 2)).neg_().add_(1.0).clamp_min_(0.0)  # rounding may bring it below 0
        if self.spread:
            where = (axis.gather(1, order) for axis in (ctx.origins.row, ctx.origins.column, ctx.origins.image))
            share = k.to(exists.device) / exists.sum(1).clamp_min(1)
            distance += distance_on_image(*where).mul_((self.spread * share)[:, None, None])
        weights = relative(ctx.saliency.gather(1, order), exists) ** self.weight
        most = min(int(k.max()), order.shape[1]) if k.numel() else 0
        return first_k(order.gather(1, visit(distance, weights, exists, most)), k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all pairs."""
        return similarity_flops(shape, visual, visual)

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """Weight and spread; behind the first stage a spread gained nothing."""
        return {"weight": FloatRange(0.0, 1.0), "spread": FloatRange(0.0, 1.0, later=0.0)}


def relative(saliency: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Saliencies ``(G, N)`` between 0 and 1: relative to the group's largest, shifted where some are below 0."""
    known = exists & torch.isfinite(saliency)
    values = torch.where(known, saliency.float(), 0.0)
    values = torch.where(known, values - values.amin(1, keepdim=True).clamp_max(0.0), 0.0)
    return values / values.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def distance_on_image(row: torch.Tensor, column: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Distances ``(G, N, N)`` between tokens ``(G, N)``, see `TokenOrigins`, in sides of the image.

    At most 1, and 1 between different images; 0 where a position is not known. The distance on the image alone, so
    that the same position in two frames of a video is one position.
    """
    away = row[:, :, None] - row[:, None]  # in place from here: large images make these tensors large
    away.hypot_(column[:, :, None] - column[:, None]).clamp_max_(1.0)
    return away.masked_fill_(image[:, :, None] != image[:, None], 1.0).nan_to_num_(0.0)


def visit(distance: torch.Tensor, weights: torch.Tensor, exists: torch.Tensor, most: int) -> torch.Tensor:
    """The order in which tokens are kept.

    Args:
        distance: float32 ``(G, N, N)``, 0 or more, between tokens with the best first.
        weights: float32 ``(G, N)``, 0 to 1, falling.
        exists: bool ``(G, N)``.
        most: steps to take, at most N.

    Returns:
        int64 ``(G, N)``: the `most` kept first, in the order of the greedy rule, then the others by saliency, those
        that exist before those that do not.
    """
    n = exists.shape[1]
    near = torch.full_like(weights, 2.0**32)  # farther than any token can be: the first one kept is the best
    gone, picks = ~exists, []
    for _ in range(most):  # few operations a step: on an accelerator each one is a launch
        score = (weights * near).masked_fill(gone, -1.0)
        chosen = score.argmax(1, keepdim=True)
        picks.append(chosen)
        gone = gone.scatter(1, chosen, True)
        near = torch.minimum(near, distance.gather(1, chosen[..., None].expand(-1, 1, n)).squeeze(1))
    rank = torch.where(exists, n, n + 1)
    if picks:
        step = torch.arange(most, device=rank.device).expand(len(rank), -1)
        real = step < exists.sum(1, keepdim=True)  # a group that has run out picks something gone
        rank = rank.scatter_reduce(1, torch.cat(picks, 1), torch.where(real, step, n + 1), reduce="amin")
    return rank.sort(dim=1, stable=True).indices
