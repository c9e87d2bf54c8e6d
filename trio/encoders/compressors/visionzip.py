"""VisionZip: the tokens that the class token looks at, and averages of the others (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from ...core.flops import product, projector_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.tokens import Signal
from ..reading.batched import (
    in_order,
    largest,
    members,
    merge_at,
    most_similar,
    per_input,
    rows,
    slots,
    with_class,
)
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("visionzip")
class VisionZip(BatchCompressor):
    """Dominant tokens as they are, contextual tokens that gather what is left (VisionZip, arXiv 2412.04467).

    Dominant tokens are those with the highest attention from the class token (in towers without one: received by all
    patches). Of the tokens left, every step-th in raster order is a target; each other one goes to the target with the
    most similar key (mean over heads, cosine). Contextual tokens stand at their targets' places. The published order is
    dominant tokens in raster order, then contextual ones; here all are in raster order.

    Parameters:
        contextual: how many of the k tokens are contextual: a share, rounded to the nearest, or a count, of which at
            most k - 1 are used. Default 5/32, which gives every published split: 162 + 30, 108 + 20, 54 + 10 and, by
            tile, 27 + 5.
        class_token: whether the class token, where the tower has one, is kept as one of the dominant tokens (as
            published), first of all.
        layer: block of the tower for attention and keys (published: -2).
        combine: how a contextual token is made: ``"add-mean"`` adds the mean of the others to the target (as published:
            vectors of about twice the length), ``"mean"`` is the mean of them all.
    """

    contextual: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.15625
    class_token: bool = True
    layer: int = -2
    combine: Literal["add-mean", "mean"] = "add-mean"

    def reads(self) -> tuple[Signal, ...]:
        """Attention and keys of one block."""
        return Signal("attention", self.layer), Signal("keys", self.layer)

    @property
    def wants_cls(self) -> bool:
        """See `class_token`."""
        return self.class_token

    def split(self, k: int) -> tuple[int, int]:
        """How many of k tokens are dominant (the class token included) and how many contextual."""
        wanted = self.contextual if isinstance(self.contextual, int) else int(k * self.contextual + 0.5)
        contextual = min(wanted, k - 1)
        return k - contextual, contextual

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        attention, keys = (batch.signals[signal] for signal in self.reads())
        with_cls = self.class_token and batch.cls is not None
        splits = [self.split(count) for count in k]
        dominant, contextual = [d - with_cls for d, _ in splits], [c for _, c in splits]
        chosen, into = dominant_and_contextual(attention, keys.float().mean(2), batch, dominant, contextual)
        counts = [d + c for d, c in zip(dominant, contextual, strict=True)]
        features, leaders = None, in_order(chosen, max(counts))
        if self.combine == "add-mean":
            features = target_plus_mean(batch.features, batch.sizes, chosen, into, leaders)
        compressed = merge_at(batch, leaders, torch.where(chosen, slots(chosen), into), counts, features)
        return with_class(compressed) if with_cls else compressed

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Keys left over against the targets, and what is new through the projector once more.

        An upper bound: keys are averaged over heads, and counted at the tower's full width.
        """
        dominant, contextual = self.split(keep)
        width = shape.hidden if shape.tower is None else shape.tower.hidden
        compared = product(max(0, visual - dominant), width, contextual)
        return compared + projector_flops(shape, contextual + 1)


def dominant_and_contextual(
    attention: torch.Tensor,
    keys: torch.Tensor,
    batch: TokenBatch,
    dominant: Sequence[int],
    contextual: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses dominant tokens and targets, and gives every other token to a target.

    Args:
        attention: float32 ``(G, N)``.
        keys: float32 ``(G, N, head dim)``.
        batch: the tokens.
        dominant: how many dominant tokens of each input, from 0.
        contextual: how many targets, from 0; together at most the input's count.

    Returns:
        bool ``(G, N)``, True at the dominant tokens and the targets; int64 ``(G, N)``, for each other token the one of
        these that it goes into, -1 where there are no targets and at padding.
    """
    valid, device, most = batch.present, attention.device, max(contextual)
    counts = zip(batch.counts, dominant, contextual, strict=True)
    steps = [max(1, (n - d) // max(1, c)) for n, d, c in counts]
    dominant_, contextual_, step = per_input(device, dominant, contextual, steps)
    first = largest(attention, valid, dominant_)
    if not most:
        return first, torch.full_like(first, -1, dtype=torch.int64)
    others = ~first if valid is None else valid & ~first
    number = torch.arange(most, device=device)
    # Of the tokens left, in raster order, every step-th; where there are fewer than `most`, any token stands in.
    width = others.shape[1]
    targets = in_order(others, width).gather(1, (number * step).clamp_max_(width - 1))
    exist = None if min(contextual) == most else number < contextual_
    rank = slots(others)
    chosen = first | (others & (rank % step == 0) & (rank < step * contextual_))
    into = slots(chosen).gather(1, targets).gather(1, most_similar(unit_length(keys), targets, exist))
    goes = others if min(contextual) else others & (contextual_ > 0)
    return chosen, into.masked_fill(~goes, -1)


def target_plus_mean(
    features: torch.Tensor, sizes: torch.Tensor, chosen: torch.Tensor, into: torch.Tensor, leaders: torch.Tensor
) -> torch.Tensor:
    """Each chosen token plus the mean, weighted by size, of the tokens that go into it; alone where there is none.

    Args:
        features: ``(G, N, D)``.
        sizes: float32 ``(G, N)``.
        chosen: bool ``(G, N)``.
        into: int64 ``(G, N)``, for each other token the one of the chosen that it goes into, or -1.
        leaders: int64 ``(G, M)``, the indices of the chosen.

    Returns:
        ``(G, M, D)`` in the dtype of `features`.
    """
    own = rows(features, leaders)
    followers = members(into.masked_fill(chosen, -1), leaders.shape[1], sizes)
    weight = followers.sum(2, keepdim=True)
    some = weight > 0
    mean = (followers @ features.float()) / torch.where(some, weight, 1.0)
    return torch.where(some, (own.float() + mean).to(features.dtype), own)
