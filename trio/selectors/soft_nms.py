"""Soft non-maximum suppression in feature space and on the image: no threshold, no running out of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ..core.context import SelectionContext
from ..core.flops import blocked_flops
from ..core.greedy import BLOCK, exact_products, most_distant
from ..core.ops import ranking, take_rows, unit_length
from ..core.part import Choice, FloatRange
from ..core.shape import ModelShape
from ..core.transfer import upload
from .base import SELECTORS, Selector


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

    waits: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.25
    spread: Annotated[float, Field(ge=0.0, le=10.0)] = 0.7

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        order = ranking(ctx.saliency, ctx.valid)
        exists = ctx.valid.gather(1, order)
        unit = take_rows(unit_length(ctx.features), order)
        weights = relative(ctx.saliency.gather(1, order), exists) ** self.weight
        origins = ctx.origins
        where = torch.stack([x.gather(1, order).float() for x in (origins.row, origins.column, origins.image)], 2)
        share = upload(ctx.k, exists.device) / exists.sum(1).clamp_min(1)
        spread = (self.spread * share)[:, None, None]
        one = torch.ones_like(spread)

        def distances(index: torch.Tensor, to: Literal["all", "among"]) -> torch.Tensor:
            rows = take_rows(unit, index)
            distance = torch.baddbmm(one, rows, (rows if to == "among" else unit).transpose(1, 2), alpha=-1.0)
            distance.clamp_min_(0.0)  # rounding may bring it below 0
            if self.spread:
                places = take_rows(where, index)
                distance.addcmul_(distance_on_image(places, places if to == "among" else where), spread)
            return distance

        with exact_products():
            choice = most_distant(weights, exists, ctx.k.tolist(), distances, order)
        return choice.first(ctx.k.tolist(), ctx.counts)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of the kept tokens with all, and of the candidates of each round: about, see `blocked_flops`."""
        return blocked_flops(shape, keep, visual, block=BLOCK, rounds=1 + keep // 64)

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


def distance_on_image(where: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Distances float32 ``(G, m, n)`` between tokens ``(G, m, 3)`` and others ``(G, n, 3)``, in sides of the image.

    At most 1, and 1 between different images; 0 where a position is not known. The distance on the image alone, so
    that the same position in two frames of a video is one position.

    Args:
        where: row and column as of `TokenOrigins`, and the image's number, all float32.
        others: likewise.
    """
    row, column, image = (where[..., None] - others.transpose(1, 2)[:, None]).abs_().unbind(2)
    return torch.fmax(row.hypot(column), image).clamp_max_(1.0)  # of nan and a number, `fmax` gives the number
