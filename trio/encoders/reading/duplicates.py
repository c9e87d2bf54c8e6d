"""Taking duplicates away: the removal loop of VisPruner, followed on the host from each token's nearest others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from ...core.greedy import exact_products
from ...core.transfer import upload
from .batched import rows
from .blocks import row_blocks

#: How many of the most similar other tokens the host knows of each one; so many it looks at first.
NEAREST, FIRST = 64, 8


def distinct(
    unit: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int], k: Sequence[int], remove: int
) -> torch.Tensor:
    """Takes duplicates away until k tokens are left.

    Every other token of a list (a) is compared with those between (b); those of a that are most similar to one of b go,
    and the list goes on as what is left of a, the most similar first, and b. The device finds the `NEAREST` others of
    each token, and the host follows the rule as long as these tell which one of b is the most similar: until about two
    thirds of the tokens are gone, where similar tokens are spread over a and b. Then the device compares those that are
    left. Each time takes a fixed number of operations for a block of rows, and one wait.

    Comparing all pairs of the first two halves is the method itself: that takes O(N^2) time. Memory is O(N) beyond one
    block.

    Args:
        unit: float32 ``(G, N, D)`` of length 1.
        tokens: int64 ``(G, T)``, indices of the N.
        counts: how many of them each input has; what stands behind them plays no role.
        k: from 0 to the count.
        remove: how many to remove at a time.

    Returns:
        bool ``(G, N)``, True at k of the tokens.
    """
    width, device = unit.shape[1], unit.device
    places = [np.arange(count if wanted else 0) for count, wanted in zip(counts, k, strict=True)]  # in `tokens`
    while True:
        open_ = [len(own) > wanted for own, wanted in zip(places, k, strict=True)]
        if not any(open_):
            break
        left = [len(own) if going else 0 for own, going in zip(places, open_, strict=True)]
        line = tokens.gather(1, upload(torch.from_numpy(_padded(places, max(left))), device))
        known = _nearest(rows(unit, line), left)
        for g, own in enumerate(known):
            if open_[g]:
                places[g] = places[g][_follow(own, k[g], remove)]
    chosen = torch.zeros(len(k), width + 1, dtype=torch.bool, device=device)
    most = max(map(len, places))
    kept = pad(tokens, (0, 1), value=width).gather(
        1, upload(torch.from_numpy(_padded(places, most, tokens.shape[1])), device)
    )
    return chosen.scatter_(1, kept, True)[:, :width]


def _padded(places: Sequence[NDArray[np.int64]], most: int, value: int = 0) -> NDArray[np.int64]:
    """int64 ``(G, most)``."""
    out = np.full((len(places), most), value)
    for row, own in zip(out, places, strict=True):
        row[: min(len(own), most)] = own[:most]
    return out


@dataclass(frozen=True)
class _Known:
    """What the host knows of n tokens of a list.

    Attributes:
        length: of the longest list; what is listed of a shorter one behind its end is in no list.
        token: int64 ``(n, m)``, the tokens most similar to each one, the most similar first.
        likeness: float32 ``(n, m)``, how similar; what is not listed is no more similar than the last.
        start: float32 ``(n,)``, how similar each is to the most similar one between (1, 3, 5, ...).
    """

    length: int
    token: NDArray[np.int64]
    likeness: NDArray[np.float32]
    start: NDArray[np.float32]


def _nearest(unit: torch.Tensor, counts: Sequence[int]) -> list[_Known]:
    """What the host is to know of lists of tokens, float32 ``(G, T, D)`` of length 1: one copy from the device."""
    length = unit.shape[1]
    exist = torch.arange(length, device=unit.device) < upload(counts, unit.device)[:, None]
    absent, columns, parts = ~exist[:, None], unit.transpose(1, 2), []
    most = min(NEAREST, length)
    with exact_products():
        for block in row_blocks(unit, length, length):
            similarity = (unit[:, block] @ columns).masked_fill_(absent, float("-inf"))
            similarity.diagonal(block.start, 1, 2).fill_(float("-inf"))
            likeness, token = similarity.topk(most, dim=2)
            start = similarity[..., 1::2].amax(2, keepdim=True) if length > 1 else likeness[..., :1]
            parts.append(torch.cat([likeness, token.float(), start], 2))
    packed = torch.cat(parts, 1).cpu().numpy()
    return [
        _Known(length, own[:, most:-1].astype(np.int64), own[:, :most], own[:, -1])
        for own in (row[:count] for row, count in zip(packed, counts, strict=True))
    ]


def _follow(known: _Known, k: int, remove: int) -> NDArray[np.int64]:
    """Follows the rule as far as it is known what is most similar, one removal at least.

    Returns:
        int64 ``(n',)``, the places of the tokens left, in their new order; n' is k where the end was reached.
    """
    line, likeness = np.arange(len(known.start)), known.start[::2]
    while True:
        a, b = line[::2], line[1::2]
        gone = min(remove, len(line) - k, len(a))
        line = np.concatenate([a[np.argsort(-likeness, kind="stable")[gone:]], b])
        if len(line) == k:
            return line
        following = _most_similar(known, line)
        if following is None:
            return line
        likeness = following


def _most_similar(known: _Known, line: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """How similar every other token of a list is to the most similar one between; None where one is not known."""
    between = np.zeros(known.length, dtype=np.bool_)
    between[line[1::2]] = True
    a = line[::2]
    found = between[known.token[a, :FIRST]]
    first = found.argmax(1)
    missed = np.flatnonzero(~found[np.arange(len(a)), first])
    if len(missed):
        more = between[known.token[a[missed]]]
        first[missed] = more.argmax(1)
        if not more[np.arange(len(missed)), first[missed]].all():
            return None
    likeness: NDArray[np.float32] = known.likeness[a, first]
    return likeness
