"""Greedy selection in blocks: the exact rule without all pairs in memory, a fixed number of operations a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from .transfer import upload

#: Candidates that are compared with each other in a round.
BLOCK = 128
#: Farther than any token can be, so that the first one kept is the one of the largest weight.
FAR = 2.0**32

#: Between tokens, int64 ``(G, m)``, and all N, float32 ``(G, m, N)``, or among those tokens, ``(G, m, m)``; 0 or more.
Distances = Callable[[torch.Tensor, Literal["all", "among"]], torch.Tensor]


def most_distant(
    weights: torch.Tensor,
    exists: torch.Tensor,
    k: Sequence[int],
    distances: Distances,
    order: torch.Tensor | None = None,
) -> HostChoice:
    """The tokens that a greedy rule keeps: again and again the one with the largest weight times distance.

    The distance is that to the nearest token kept so far. It only falls while tokens are kept, so scores from earlier
    rounds bound those of now. In each round the `BLOCK` best are compared with each other exactly, on the host, and
    kept as long as the best of them is above the best score outside; then all scores are brought up to date at once.
    That takes O(k N) time, O(N) memory beyond one block, and one wait for the device a round. The set is that of the
    rule applied to all pairs at once, wherever gaps between scores exceed rounding.

    Args:
        weights: float32 ``(G, N)``, 0 or more; ties go to the lower index.
        exists: bool ``(G, N)``.
        k: tokens to keep of each group.
        distances: between tokens of a group.
        order: see `HostChoice`.

    Returns:
        The kept tokens: k of each group, or fewer where fewer exist or a distance is nan.
    """
    tokens = weights.shape[1]
    choice = HostChoice.none(len(k), tokens)
    size = min(BLOCK, tokens)
    # One column more: a token that is closed, so that there is always one outside, and padding has a place.
    weights, closed = pad(weights, (0, 1)), pad(~exists, (0, 1), value=True)
    nearest = torch.full_like(weights, FAR)
    remaining = np.asarray(k, dtype=np.int64)
    while size and remaining.any():
        best = (weights * nearest).masked_fill_(closed, -1.0).sort(dim=1, descending=True, stable=True)
        block = best.indices[:, :size]
        columns = [best.values[:, : size + 1], best.indices[:, : size + 1].float()]
        columns += [weights.gather(1, block), nearest.gather(1, block), distances(block, "among").flatten(1)]
        packed = choice.downloaded(columns, order)
        chosen, counts = _within(packed, size, remaining)
        choice.add(chosen)
        if not counts.any():
            break
        remaining = np.where(counts > 0, remaining - counts, 0)
        repeated, marked = uploaded_choice(chosen, tokens, weights.device)
        closed.scatter_(1, marked, True)
        if size == tokens:  # nothing is outside the block
            break
        if remaining.any():
            known = nearest[:, :tokens]
            torch.minimum(known, distances(repeated, "all").amin(1), out=known)
    return choice


def _within(
    packed: NDArray[np.float32], size: int, remaining: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Follows the rule inside the blocks of all groups, as far as no token outside can come first.

    Args:
        packed: ``(G, 2 (m + 1) + 2 m + m m)``: scores (below 0: closed) and indices of the m tokens of the block and of
            the best one outside, falling; then for the block weights, distances to what is kept, and distances.
        size: m.
        remaining: int64 ``(G,)``, tokens still to be kept.

    Returns:
        Tokens kept, int64 ``(G, p)`` in order with -1 behind them, and how many, int64 ``(G,)``.
    """
    parts = np.split(packed, np.cumsum([size, 1, size, 1, size, size]), axis=1)
    score, bound, token, beyond, weight, nearest = parts[:6]
    among = parts[6].reshape(len(packed), size, size)
    by_index, group = token.argsort(1), np.arange(len(packed))  # `argmax` is to find the lower one of equal tokens
    score, token, weight, nearest = (np.take_along_axis(x, by_index, 1) for x in (score, token, weight, nearest))
    closed, going = score < 0, remaining > 0
    chosen: list[NDArray[np.float32]] = []
    while len(chosen) < size:
        slot = score.argmax(1)
        top, which = score[group, slot], token[group, slot]
        ahead = (top > bound[:, 0]) | ((top == bound[:, 0]) & (which < beyond[:, 0]))
        going = going & (len(chosen) < remaining) & (top >= 0) & ahead
        if not going.any():
            break
        chosen.append(np.where(going, which, np.float32(-1)))
        closed[group, slot] = True
        fresh = np.take_along_axis(among[group, by_index[group, slot]], by_index, 1)
        nearest = np.minimum(nearest, fresh)
        score = np.where(closed, np.float32(-1.0), weight * nearest)
    tokens = np.stack(chosen, 1).astype(np.int64) if chosen else np.full((len(packed), 0), -1)
    return tokens, (tokens >= 0).sum(1)


@dataclass
class HostChoice:
    """What a rule chose on the host, of G groups of N tokens.

    Attributes:
        kept: bool ``(G, N)``.
        order: int64 ``(G, N)``, of a ranking the token at each place, where one was given: places are what is chosen
            then. It comes to the host with the first round.
    """

    kept: NDArray[np.bool_]
    order: NDArray[np.int64] | None = None

    @classmethod
    def none(cls, groups: int, tokens: int) -> HostChoice:
        """Nothing yet."""
        return cls(np.zeros((groups, tokens), dtype=np.bool_))

    def downloaded(self, columns: Sequence[torch.Tensor], order: torch.Tensor | None) -> NDArray[Any]:
        """Columns ``(G, n)`` of one type side by side on the host: here a round waits for the device."""
        brings = order is not None and self.order is None
        more = [order.to(columns[0].dtype)] if order is not None and brings else []
        packed = torch.cat([*columns, *more], 1).detach().cpu().numpy()
        if not brings:
            return packed
        tokens = self.kept.shape[1]
        self.order = packed[:, packed.shape[1] - tokens :].astype(np.int64)
        return packed[:, : packed.shape[1] - tokens]

    def add(self, chosen: NDArray[np.int64]) -> None:
        """Notes the tokens of a round, int64 ``(G, p)`` with -1 as padding."""
        group, column = np.nonzero(chosen >= 0)
        self.kept[group, chosen[group, column]] = True

    def first(self, k: Sequence[int], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What a selector returns, on the CPU: the kept tokens, filled up to k with the best of the others.

        Args:
            k: tokens of each group.
            counts: that each group has; they come first in the ranking.

        Returns:
            See `trio.core.ops.first_k`.
        """
        most, tokens = max(k, default=0), self.kept.shape[1]
        indices = np.full((len(k), most), max(tokens - 1, 0))
        for row, kept, wanted, count, group in zip(indices, self.kept, k, counts, range(len(k)), strict=True):
            there = kept[:count]
            places = np.concatenate([np.flatnonzero(there), np.flatnonzero(~there)])[:wanted]
            row[:wanted] = np.sort(places if self.order is None else self.order[group, places])
        return torch.from_numpy(indices), torch.arange(most) < torch.tensor(k, dtype=torch.int64)[:, None]


def uploaded_choice(chosen: NDArray[np.int64], tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that were chosen on the host, int64 ``(G, p)`` with -1 as padding, on the device in two forms.

    Returns:
        Padding repeats the first choice, which changes no minimum and suppresses the same; and padding stands behind
        the last of the `tokens`, where a mask of one column more takes it.
    """
    padding, first = chosen < 0, chosen[:, :1].clip(0)
    forms = np.stack([np.where(padding, first, chosen), np.where(padding, tokens, chosen)])
    repeated, behind = upload(torch.from_numpy(forms), device)
    return repeated, behind


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 matrix products in float32, whatever the process allows (TF32, bfloat16), and its setting back after."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
