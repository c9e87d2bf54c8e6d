"""VisionZip: the tokens that the class token looks at, and averages of the others (arXiv 2412.04467)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ...core.flops import product, projector_flops
from ...core.shape import ModelShape
from ...core.tokens import Signal, VisualTokens
from ..reading.merge import largest, leaders_lead, members, merge, most_similar, patches_only, with_class
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("visionzip")
class VisionZip(Compressor):
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

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`; with k = n the class token is not kept."""
        attention, keys = (tokens.signals[signal] for signal in self.reads())
        cls = tokens.cls if self.class_token else None
        dominant, contextual = self.split(k)
        leaders, into = dominant_and_contextual(
            attention, keys.float().mean(1), dominant - (cls is not None), contextual
        )
        features = None
        if self.combine == "add-mean":
            features = target_plus_mean(tokens.features, tokens.sizes, leaders, into)
        compressed = merge(tokens, leaders, into, features)
        return compressed if cls is None else with_class(compressed, cls)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Keys left over against the targets, and what is new through the projector once more.

        An upper bound: keys are averaged over heads, and counted at the tower's full width.
        """
        dominant, contextual = self.split(keep)
        width = shape.hidden if shape.tower is None else shape.tower.hidden
        compared = product(max(0, visual - dominant), width, contextual)
        return compared + projector_flops(shape, contextual + 1)


def dominant_and_contextual(
    attention: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses dominant tokens and targets, and gives every other token to a target.

    Args:
        attention: float32 ``(n,)``.
        keys: float32 ``(n, head dim)``.
        dominant: how many dominant tokens, from 0.
        contextual: how many targets, from 0; together at most n.

    Returns:
        int64 ``(m,)``, rising indices of the m = dominant + contextual tokens; int64 ``(n,)``, for each token the one
        of the m that it goes into, -1 where there are no targets.
    """
    n = len(attention)
    first = largest(attention, dominant)
    # Stable sort of the mask: the indices of what is left, rising, in a shape that does not depend on values.
    rest = (
        torch.zeros_like(attention, dtype=torch.int8).index_fill(0, first, 1).sort(stable=True).indices[: n - dominant]
    )
    step = max(1, len(rest) // max(1, contextual))
    targets = rest[::step][:contextual]
    leaders = torch.cat([first, targets]).sort().values
    into = rest.new_full((n,), -1)
    if contextual:
        into[rest] = torch.searchsorted(leaders, targets.contiguous())[most_similar(keys[rest], keys[targets])]
    return leaders, leaders_lead(into, leaders)


def target_plus_mean(
    features: torch.Tensor, sizes: torch.Tensor, leaders: torch.Tensor, into: torch.Tensor
) -> torch.Tensor:
    """Each leader plus the mean, weighted by size, of the tokens that go into it; alone where there is none.

    Args:
        features: ``(n, D)``.
        sizes: float32 ``(n,)``.
        leaders: int64 ``(m,)``.
        into: int64 ``(n,)``.

    Returns:
        ``(m, D)`` in the dtype of `features`.
    """
    followers = members(into.index_fill(0, leaders, -1), len(leaders), sizes)
    weight = followers.sum(1, keepdim=True)
    mean = followers @ features.float() / torch.where(weight > 0, weight, 1.0)
    return torch.where(weight > 0, (features[leaders].float() + mean).to(features.dtype), features[leaders])
