"""Numbers from repeated measurements: medians, and intervals that assume nothing about how times are spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from ...core.record import Record

__all__ = ["Interval", "Spread", "interval", "spread"]


class Spread(Record):
    """A measurement that was repeated.

    Attributes:
        median: of all rounds.
        low: the smallest but the lowest quarter.
        high: the largest but the highest quarter.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int


class Interval(Record):
    """The median of ratios of two things measured in the same rounds.

    Attributes:
        value: the median.
        low: lower end of the interval.
        high: upper end.
        coverage: probability that such an interval holds the true median: 0.95 or more from 6 rounds on.
        rounds: how many.
    """

    value: float
    low: float
    high: float
    coverage: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return Spread(median=median(ordered), low=ordered[cut], high=ordered[-1 - cut], rounds=len(ordered))


def interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The median with an interval between two order statistics, exact whatever the distribution.

    The narrowest symmetric pair whose coverage is at least `level`; with too few values the smallest and the largest,
    and `coverage` says how sure that is.
    """
    ordered, count = sorted(values), len(values)
    missed = [2 * sum(math.comb(count, i) for i in range(cut + 1)) / 2**count for cut in range((count + 1) // 2)]
    cut = max([cut for cut, miss in enumerate(missed) if miss <= 1 - level], default=0)
    return Interval(
        value=median(ordered),
        low=ordered[cut],
        high=ordered[-1 - cut],
        coverage=max(0.0, 1 - missed[cut]),
        rounds=count,
    )
