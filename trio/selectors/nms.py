"""Non-maximum suppression in feature space, TRIO's selector (arXiv 2602.04657)."""

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

#: Candidates compared with all tokens at a time where similarities are computed in blocks.
BLOCK = 64


@SELECTORS.register("nms")
class NMS(Selector):
    """Greedy non-maximum suppression, exact and batched.

    Tokens are visited by falling saliency (ties: lower index first). A visited token is kept, and every token whose
    cosine similarity with it is at least `threshold` is suppressed, until k are kept. Where tokens run out first, the
    best suppressed ones fill up.

    Parameters:
        threshold: cosine similarity from which on a token counts as a duplicate (paper and code: 0.8). Above 1 nothing
            is suppressed (top-k); at -1 everything is.
        centre: subtract the mean of the group's features before similarities are taken (not in the paper): hidden
            states of deep layers share a large common part, which makes all of them look alike.
        quantile: in place of `threshold` (not in the paper): of all pairs of a group, the share that is less similar
            than what counts as a duplicate, so that the suppression is as strong at every depth.
    """

    threshold: Annotated[float, Field(ge=-1.0, le=1.01)] = 0.8
    centre: bool = False
    quantile: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        saliency, features, valid = ctx.saliency, ctx.features, ctx.valid
        order = ranking(saliency, valid)
        unit = unit_length(centred(features, valid) if self.centre else features)
        if self.quantile is None:
            threshold = torch.full_like(saliency[:, 0], self.threshold, dtype=torch.float32)
        else:
            threshold = similarity_quantile(unit, valid, self.quantile)
        unit = unit.gather(1, order[..., None].expand_as(unit))
        exists = valid.gather(1, order)
        if features.device.type == "cpu":
            kept = suppress_in_blocks(unit, exists, threshold, ctx.k)
        else:
            kept = suppress_at_once(unit, exists, threshold)
        # Kept ones first, then the best suppressed ones, then what does not exist; each in order of saliency.
        rank = torch.where(kept, 0, torch.where(exists, 1, 2)).to(torch.int8).sort(dim=1, stable=True).indices
        return first_k(order.gather(1, rank), ctx.k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of the kept tokens with all, the lower bound.

        Suppressed candidates need no rows of their own, but computing in blocks computes some of them; the upper bound
        is that of all pairs.
        """
        return similarity_flops(shape, keep, visual)

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """Thresholds from half alike on."""
        return {"threshold": FloatRange(0.5, 1.0)}


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Features ``(G, N, D)`` at length 1, float32; zeros stay zeros, huge and tiny ones neither overflow nor vanish."""
    features = features.float()
    features = features / features.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    norms: torch.Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / norms.clamp_min(1e-12)


def centred(features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Features ``(G, N, D)`` without the mean of the tokens that exist (bool ``(G, N)``), float32."""
    features = features.float()
    there = valid[..., None]
    mean = torch.where(there, features, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return features - mean


def similarity_quantile(unit: torch.Tensor, valid: torch.Tensor, quantile: float) -> torch.Tensor:
    """The similarity that a share of all pairs of different tokens lies below.

    Args:
        unit: float32 ``(G, N, D)`` of length 1 (or 0).
        valid: bool ``(G, N)``.
        quantile: the share, 0 to 1.

    Returns:
        float32 ``(G,)``; of the values that occur the nearest one above. 2 where a group has no pair.
    """
    found = []
    for rows, there in zip(unit, valid, strict=True):
        n = rows.shape[0]
        pair = (there[:, None] & there).triu(1)
        ordered = (rows @ rows.T).masked_fill(~pair, 2.0).flatten().sort().values
        last = (pair.sum() - 1).clamp_min(0)
        place = (last * quantile).ceil().long()
        found.append(torch.where(pair.any(), ordered.gather(0, place[None])[0], 2.0) if n else rows.new_tensor(2.0))
    return torch.stack(found) if found else unit.new_zeros(0)


def suppress_in_blocks(
    unit: torch.Tensor, exists: torch.Tensor, threshold: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """Greedy suppression that computes only the similarities of the next candidates, and stops at k.

    Args:
        unit: float32 ``(G, N, D)`` of length 1 (or 0), best first.
        exists: bool ``(G, N)``.
        threshold: float32 ``(G,)``, see `NMS`.
        k: int64 ``(G,)`` on the CPU; the answer is exact for the first k that are kept, later ones are left out.

    Returns:
        bool ``(G, N)``, True at kept tokens.
    """
    groups = [_suppress_one(unit[g], exists[g], float(threshold[g]), int(k[g])) for g in range(unit.shape[0])]
    return torch.stack(groups) if groups else exists.clone()


def _suppress_one(unit: torch.Tensor, exists: torch.Tensor, threshold: float, k: int) -> torch.Tensor:
    kept = torch.zeros_like(exists)
    alive = exists.clone()
    count = 0
    while count < k:
        candidates = alive.nonzero().squeeze(1)[:BLOCK]
        if not len(candidates):
            break
        near = unit[candidates] @ unit.T >= threshold
        among = near[:, candidates]
        # Within the block a candidate survives if no earlier survivor is near it.
        survivors: list[int] = []
        dead = torch.zeros(len(candidates), dtype=torch.bool)
        for i in range(len(candidates)):
            if count == k:
                break
            if not dead[i]:
                survivors.append(i)
                dead |= among[i]
                count += 1
        kept[candidates[survivors]] = True
        alive[candidates] = False
        alive &= ~near[survivors].any(0)
    return kept


def suppress_at_once(unit: torch.Tensor, exists: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Greedy suppression from all similarities, for accelerators: the fixed point of "kept unless near a kept one".

    A token's fate depends on better tokens only, so repeating the rule settles at least one more token each time and
    the fixed point is the greedy answer; it is reached after the longest chain of suppressions, in practice a few.

    Args:
        unit: float32 ``(G, N, D)`` of length 1 (or 0), best first.
        exists: bool ``(G, N)``.
        threshold: float32 ``(G,)``, see `NMS`.

    Returns:
        bool ``(G, N)``, True at kept tokens.
    """
    near = (unit @ unit.transpose(1, 2) >= threshold[:, None, None]).triu(1)  # [g, i, j]: the better i would suppress j
    kept = exists
    for _ in range(unit.shape[1]):
        suppressed = (near & kept[..., None]).any(1)
        settled = exists & ~suppressed
        if torch.equal(settled, kept):
            break
        kept = settled
    return kept
