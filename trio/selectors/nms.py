"""Non-maximum suppression in feature space, TRIO's selector (arXiv 2602.04657)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn.functional import pad

from ..core.context import SelectionContext
from ..core.flops import blocked_flops
from ..core.greedy import HostChoice, exact_products, uploaded_choice
from ..core.ops import ranking, take_rows, unit_length
from ..core.part import Choice, FloatRange
from ..core.shape import ModelShape
from .base import SELECTORS, Selector

#: Candidates that are compared with each other in a round.
BLOCK = 256


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
    """

    waits: ClassVar[bool] = True

    threshold: Annotated[float, Field(ge=-1.0, le=1.01)] = 0.8
    centre: bool = False

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        order = ranking(ctx.saliency, ctx.valid)
        exists = ctx.valid.gather(1, order)
        unit = unit_length(centred(ctx.features, ctx.valid) if self.centre else ctx.features)
        with exact_products():
            choice = suppress(take_rows(unit, order), exists, self.threshold, ctx.k.tolist(), order)
        return choice.first(ctx.k.tolist(), ctx.counts)  # the best suppressed ones fill up

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of the kept tokens with all, and of one block of candidates: about, see `blocked_flops`."""
        return blocked_flops(shape, keep, visual, block=BLOCK, rounds=1)

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """Thresholds from half alike on."""
        return {"threshold": FloatRange(0.5, 1.0)}


def centred(features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Features ``(G, N, D)`` without the mean of the tokens that exist (bool ``(G, N)``), float32."""
    features = features.float()
    there = valid[..., None]
    mean = torch.where(there, features, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return features - mean


def suppress(
    unit: torch.Tensor, exists: torch.Tensor, threshold: float, k: Sequence[int], order: torch.Tensor | None = None
) -> HostChoice:
    """Greedy suppression in blocks: the next candidates among each other, then the kept ones against all.

    That takes O(k N + N m) time for blocks of m, O(N) memory beyond one block, and one wait for the device a block.

    Args:
        unit: float32 ``(G, N, D)`` of length 1 (or 0), best first.
        exists: bool ``(G, N)``.
        threshold: see `NMS`.
        k: the answer is exact for the first k that are kept, later ones are left out.
        order: see `HostChoice`.

    Returns:
        The kept tokens.
    """
    tokens = unit.shape[1]
    size = min(BLOCK, tokens)
    # One column more: padding has a place there.
    closed, choice = pad(~exists, (0, 1), value=True), HostChoice.none(*exists.shape)
    remaining = np.asarray(k, dtype=np.int64)
    while size and remaining.any():
        block = closed.to(torch.int8).sort(dim=1, stable=True).indices[:, :size]
        rows = take_rows(unit, block)
        near = torch.bmm(rows, rows.transpose(1, 2)) >= threshold
        columns = [block.int(), closed.gather(1, block), near.flatten(1)]
        packed = choice.downloaded(columns, order)
        chosen, counts = _survivors(packed, size, remaining)
        choice.add(chosen)
        if not counts.any():
            break
        remaining = np.where(counts > 0, remaining - counts, 0)
        if size == tokens:  # nothing is outside the block
            break
        if remaining.any():
            repeated, _ = uploaded_choice(chosen, tokens, unit.device)
            closed[:, :tokens] |= (torch.bmm(take_rows(unit, repeated), unit.transpose(1, 2)) >= threshold).any(1)
            closed.scatter_(1, block, True)
    return choice


def _survivors(
    packed: NDArray[np.int32], size: int, remaining: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Follows the rule inside the blocks of all groups.

    Args:
        packed: ``(G, 2 m + m m)``: of the m candidates, best first, the indices, whether each is closed, and for each
            whether it is near to each other one.
        size: m.
        remaining: int64 ``(G,)``, tokens still to be kept.

    Returns:
        Tokens kept, int64 ``(G, p)`` in order with -1 behind them, and how many, int64 ``(G,)``.
    """
    token, dead = packed[:, :size], packed[:, size : 2 * size] > 0
    near = packed[:, 2 * size :].reshape(len(packed), size, size) > 0
    group, going = np.arange(len(packed)), remaining > 0
    chosen: list[NDArray[np.int32]] = []
    while True:
        slot = dead.argmin(1)  # the first one that is open
        going = going & ~dead[group, slot] & (len(chosen) < remaining)
        if not going.any():
            break
        chosen.append(np.where(going, token[group, slot], np.int32(-1)))
        dead = dead | near[group, slot]
        dead[group, slot] = True  # a feature of zeros is not near itself
    tokens = np.stack(chosen, 1).astype(np.int64) if chosen else np.full((len(packed), 0), -1)
    return tokens, (tokens >= 0).sum(1)
