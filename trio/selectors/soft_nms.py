"""Soft non-maximum suppression in feature space: no threshold, no running out of tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from trio.registry import SELECTORS
from trio.selectors.base import Selector
from trio.selectors.common import first_k, ranking
from trio.selectors.nms import unit_length


@SELECTORS.register("soft-nms")
class SoftNMS(Selector):
    """Greedy selection by saliency, weighed down near what is kept already.

    The next token kept is always the one with the largest ``s ** weight * (1 - c)``, where s is its saliency relative
    to the group's best and c its largest cosine similarity with a token kept so far; the first one is the best. That
    is Soft-NMS (arXiv 1704.04503) with similarities of features in place of overlaps of boxes, and the max-min
    diversity of DivPrune (arXiv 2503.02175) with saliencies as weights.

    It is what we changed in TRIO (arXiv 2602.04657), whose `nms` drops duplicates at a fixed threshold. Where few
    tokens differ by so much, as at the input of a language model, that runs out of tokens early, and duplicates of the
    best ones fill up the budget. Saliencies below 0 are shifted to begin at 0.

    Parameters:
        weight: exponent of the saliency: 0 looks at diversity alone, large values at saliency alone (top-k). 0.25 was
            chosen on the zoo's validation scenes (docs/results.md).
    """

    weight: Annotated[float, Field(ge=0.0, le=100.0)] = 0.25

    def select(
        self, saliency: torch.Tensor, features: torch.Tensor, k: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        order = ranking(saliency, valid)
        exists = valid.gather(1, order)
        unit = unit_length(features)
        unit = unit.gather(1, order[..., None].expand_as(unit))
        weights = relative(saliency.gather(1, order), exists) ** self.weight
        most = min(int(k.max()), order.shape[1]) if k.numel() else 0
        return first_k(order.gather(1, visit(unit, weights, exists, most)), k)


def relative(saliency: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Saliencies ``(G, N)`` between 0 and 1: relative to the group's largest, shifted where some are below 0."""
    known = exists & torch.isfinite(saliency)
    values = torch.where(known, saliency.float(), 0.0)
    values = torch.where(known, values - values.amin(1, keepdim=True).clamp_max(0.0), 0.0)
    return values / values.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def visit(unit: torch.Tensor, weights: torch.Tensor, exists: torch.Tensor, most: int) -> torch.Tensor:
    """The order in which tokens are kept.

    Args:
        unit: float32 ``(G, N, D)`` of length 1 (or 0), best first.
        weights: float32 ``(G, N)``, 0 to 1, falling.
        exists: bool ``(G, N)``.
        most: steps to take, at most N.

    Returns:
        int64 ``(G, N)``: the `most` kept first, in the order of the greedy rule, then the others by saliency, those
        that exist before those that do not.
    """
    n = exists.shape[1]
    distance = (1.0 - unit @ unit.transpose(1, 2)).clamp_min(0.0)  # rounding may make a duplicate's slightly negative
    near = torch.full_like(weights, 2.0)  # farther than any token can be: the first one kept is the best
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
