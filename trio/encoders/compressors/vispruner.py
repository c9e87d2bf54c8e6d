"""VisPruner: important tokens by attention, diverse ones by taking duplicates away (arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch.nn.functional import pad

from ...core.flops import feature_width, product
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.tokens import Signal
from ...core.transfer import upload
from ..reading.batched import first_of, keep, per_input, ranking
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
        """Similarities of one half of the tokens left with the other, each time that some are removed."""
        important = int(keep * self.important)
        diverse, left, total = keep - important, visual - important, 0
        while diverse and left > diverse:
            half = (left + 1) // 2
            total += product(half, feature_width(shape), left - half)
            left -= min(self.remove, left - diverse, half)
        return total


def distinct(
    unit: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int], k: Sequence[int], remove: int
) -> torch.Tensor:
    """Takes duplicates away until k tokens are left.

    Args:
        unit: float32 ``(G, N, D)`` of length 1.
        tokens: int64 ``(G, T)``, indices of the N.
        counts: how many of them each input has; what stands behind them plays no role.
        k: from 0 to the count.
        remove: how many to remove at a time.

    Returns:
        bool ``(G, N)``, True at k of the tokens.
    """
    groups, width, _ = unit.shape
    counts = [n if wanted else 0 for n, wanted in zip(counts, k, strict=True)]
    tokens = tokens[:, : max(counts)]
    # One token more, like no other: it stands at padding, and comes last among those that are removed.
    similarity = pad(unit @ unit.transpose(1, 2), (0, 1, 0, 1), value=float("-inf"))
    (count,) = per_input(unit.device, counts)
    place = torch.arange(tokens.shape[1], device=unit.device)
    group = torch.arange(groups, device=unit.device)[:, None]
    tokens, padding = torch.where(place < count, tokens, width), tokens.new_full((groups, 1), width)
    for after, length in _rounds(counts, k, remove, unit.device):
        a, b = tokens[:, ::2], tokens[:, 1::2]
        likeness = similarity[group, a].gather(2, b[:, None].expand(-1, a.shape[1], -1)).amax(2)
        best = likeness.sort(dim=1, descending=True, stable=True).indices
        tokens = torch.cat([a.gather(1, best), b, padding], 1).gather(1, after[:, :length])
    (count,) = per_input(unit.device, k)
    chosen = torch.zeros(groups, width + 1, dtype=torch.bool, device=unit.device)
    left = torch.where(torch.arange(tokens.shape[1], device=unit.device) < count, tokens, width)
    return chosen.scatter_(1, left, True)[:, :width]


def _rounds(
    counts: Sequence[int], k: Sequence[int], remove: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, int]]:
    """For each round the places of what is left in the list of every other token, those between, and one of padding.

    Counts are known before, so that one copy to the device serves all rounds.

    Yields:
        int64 ``(G, T)`` and how many of its columns tokens need; what stands there beyond an input's own is padding.
    """
    left, removed, odd, lengths = list(counts), [], [], [max(counts, default=0)]
    while any(n > wanted for n, wanted in zip(left, k, strict=True)):
        taken = [min(remove, n - wanted, (n + 1) // 2) for n, wanted in zip(left, k, strict=True)]
        removed.append(taken)
        odd.append([(n + 1) // 2 for n in left])
        left = [n - gone for n, gone in zip(left, taken, strict=True)]
        lengths.append(max(left))
    if not removed:
        return
    taken_, first = upload(torch.tensor([removed, odd]), device).unsqueeze(-1)  # each (rounds, G, 1)
    every = upload(torch.tensor([[(length + 1) // 2, length] for length in lengths[:-1]]), device)[..., None, None]
    place = torch.arange(lengths[1], device=device)
    behind = place - (first - taken_)  # among those between
    after = torch.where(behind < 0, place + taken_, behind + every[:, 0])
    after = torch.minimum(after, every[:, 1])
    yield from zip(after.unbind(0), lengths[1:], strict=True)
