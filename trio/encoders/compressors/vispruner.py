"""VisPruner: important tokens by attention, diverse ones by taking duplicates away (arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from ...core.flops import feature_width, product
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.tokens import Signal
from ..reading.batched import first_of, keep, per_input, ranking
from ..reading.duplicates import NEAREST, distinct
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("vispruner")
class VisPruner(BatchCompressor):
    """Important tokens by attention, diverse ones of the rest by removing duplicates (VisPruner, arXiv 2412.01818).

    Important tokens are those with the highest attention from the class token (in towers without one: received by all
    patches). The rest, by falling attention, is split again and again into every other token (a) and those between (b);
    each time the tokens of a that are most cosine-similar to one of b are removed, until the number asked for is left.
    Removed tokens are dropped.

    Parameters:
        important: share of the k tokens that is important, rounded down (published: 0.5).
        remove: how many tokens are removed at a time (published: 8).
        layer: block of the tower for attention (published: -2).
    """

    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    remove: Annotated[int, Field(ge=1)] = 8
    layer: int = -2

    def reads(self) -> tuple[Signal, ...]:
        """Attention of one block."""
        return (Signal("attention", self.layer),)

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        order = ranking(batch.signals[self.reads()[0]], batch.valid)
        important = [int(count * self.important) for count in k]
        (first,) = per_input(order.device, important)
        chosen = first_of(order, first)
        others = [n - count for n, count in zip(batch.counts, important, strict=True)]
        left = [count - done for count, done in zip(k, important, strict=True)]
        if max(left):
            number = torch.arange(max(others), device=order.device)
            rest = order.gather(1, (number + first).clamp_max_(order.shape[1] - 1))
            chosen |= distinct(unit_length(batch.features), rest, others, left, self.remove)
        return keep(batch, chosen, k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all tokens that are not important, and again of those left each time two thirds are gone."""
        important = int(keep * self.important)
        diverse, left, total = keep - important, visual - important, 0
        while diverse and left > diverse:
            total += product(left, feature_width(shape), left)
            left = 0 if left <= NEAREST else left // 3
        return total
