"""Intervals and tests for answers to the same questions; questions about one scene are drawn together.

- Intervals: bootstrap over scenes (percentiles), the same draws for every row, so that differences are paired and
  ratios of differences come with intervals too. Where every answer of a row is right, or every one is wrong, a
  bootstrap has no width: Wilson's interval stands there, each scene counted once.
- Differences from the baseline: a sign-flip test over scenes (two-sided, exact under the null hypothesis that the two
  rows could change places), corrected over methods by Holm (1979). With n scenes its p is never below 2 / 2^n, so that
  few scenes cannot reject anything; `smallest_p` and `scenes_to_reject` say so before anyone reads "not above".
- Non-inferiority: a normal test of the paired difference against the margin, one-sided, its variance clustered by
  scene and widened by half a discordant scene on either side (after Agresti and Min, 2005), so that few differences
  are no proof; corrected by Holm as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Bootstrap",
    "Interval",
    "Paired",
    "holm",
    "needed_scenes",
    "paired",
    "power",
    "scenes_to_reject",
    "smallest_p",
]

Values = NDArray[np.float64]
DRAWS = 2000
FLIPS = 10_000
#: Scenes below which percentiles of a bootstrap are too near to the mean.
FEW = 10
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Draws of whole scenes, shared by all rows."""

    def __init__(self, scenes: Sequence[int], draws: int = DRAWS, seed: int = 0) -> None:
        """Draws scenes with replacement.

        Args:
            scenes: the scene of each question.
            draws: how many.
            seed: of the draws.
        """
        _, self._group = np.unique(np.asarray(scenes), return_inverse=True)
        number = int(self._group.max()) + 1
        picks = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
        self._weights: Values = picks.astype(float)
        self._number = number

    def scenes(self, chosen: NDArray[np.bool_] | None = None) -> int:
        """Scenes that have one of the chosen questions."""
        return len(np.unique(self._group if chosen is None else self._group[chosen]))

    def by_scene(self, values: Values, chosen: NDArray[np.bool_]) -> tuple[Values, Values]:
        """Sum of the chosen values, and their number, scene by scene."""
        group = self._group[chosen]
        total: Values = np.bincount(group, values[chosen], self._number).astype(float)
        return total, np.bincount(group, minlength=self._number).astype(float)

    def means(self, values: Values, chosen: NDArray[np.bool_]) -> Values:
        """The mean of the chosen values in each draw; NaN where a draw has none."""
        total, count = self.by_scene(values, chosen)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: Values = (self._weights @ total) / (self._weights @ count)
        return means

    def mean(self, values: Values, chosen: NDArray[np.bool_]) -> Interval:
        """Mean of shares from 0 to 1 with its interval."""
        picked = values[chosen]
        mean = float(picked.mean())
        if (picked == picked[0]).all() and picked[0] in (0.0, 1.0):
            scenes = self.scenes(chosen)
            low, high = wilson(round(mean * scenes), scenes)
            return Interval(mean, low, high)
        return _percentiles(mean, self.means(values, chosen))

    def difference(self, values: Values, other: Values, chosen: NDArray[np.bool_]) -> Interval:
        """Mean paired difference with its interval."""
        return _percentiles(float((values - other)[chosen].mean()), self.means(values - other, chosen))

    def retained(self, values: Values, full: Values, blind: Values, chosen: NDArray[np.bool_]) -> Interval | None:
        """(mean - blind) / (full - blind) with its interval.

        Returns:
            None where full is not surely above blind, so that there is nothing to retain: the ratio has no meaning.
        """
        gain = self.means(full - blind, chosen)
        if not np.nanpercentile(gain, 2.5) > 0:
            return None
        mean = float((values - blind)[chosen].mean() / (full - blind)[chosen].mean())
        with np.errstate(invalid="ignore", divide="ignore"):
            return _percentiles(mean, self.means(values - blind, chosen) / np.where(gain > 0, gain, np.nan))


def _percentiles(mean: float, draws: Values) -> Interval:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


@dataclass(frozen=True)
class Paired:
    """Two rows on the same questions.

    Attributes:
        difference: mean of one minus the other, as a share from -1 to 1.
        p: two-sided, of no difference (sign flips over scenes).
        error: standard error of the difference, clustered by scene and widened as said above.
        scenes: how many.
    """

    difference: float
    p: float
    error: float
    scenes: int

    def p_inferior(self, margin: float) -> float:
        """One-sided, of the first being worse than the second by the margin or more; small: it is not."""
        return 1 - _NORMAL.cdf((self.difference + margin) / self.error)


def paired(differences: Values, counts: Values, *, flips: int = FLIPS, seed: int = 0) -> Paired:
    """Tests a paired difference.

    Args:
        differences: its sum over the questions of each scene.
        counts: questions of each scene.
        flips: random signs of the sign-flip test; where there are no more patterns than that, all of them are taken.
        seed: of the signs.
    """
    there = counts > 0
    sums, n = differences[there], counts[there]
    total, questions, scenes = float(sums.sum()), float(n.sum()), len(sums)
    moved = sums[sums != 0]
    if len(moved):
        every = _patterns(len(moved), flips)
        drawn = np.random.default_rng(seed).integers(0, 2, (flips, len(moved))) if every is None else every
        extreme = int((np.abs((drawn * 2 - 1) @ moved) >= abs(total) - 1e-9).sum())
        p = (extreme + 1) / (flips + 1) if every is None else extreme / len(every)
    else:
        p = 1.0
    residual = sums - n * (total / questions)
    spread = float((residual**2).sum()) * scenes / max(1, scenes - 1)
    return Paired(total / questions, p, math.sqrt(spread + 1.0) / questions, scenes)


def _patterns(number: int, most: int) -> NDArray[np.int64] | None:
    """All patterns of zeros and ones, a row each; None where they are too many."""
    if 2**number > most:
        return None
    found: NDArray[np.int64] = (np.arange(2**number)[:, None] >> np.arange(number)) & 1
    return found


def smallest_p(scenes: int, *, flips: int = FLIPS) -> float:
    """The smallest p of `paired` on so many scenes: each of them differs, and all in one direction."""
    return min(1.0, 2.0 ** (1 - scenes)) if 2**scenes <= flips else 1 / (flips + 1)


def scenes_to_reject(tests: int, *, level: float = 0.05) -> int:
    """Scenes from which a difference can pass Holm's correction at all, in a family of so many tests."""
    return math.floor(math.log2(2 * tests / level)) + 1


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979): reject where they are below the level.

    Args:
        p_values: by hypothesis.
    """
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def needed_scenes(result: Paired, margin: float, *, tests: int, power: float = 0.9, level: float = 0.05) -> int:
    """Scenes that a non-inferiority test needs where the two are truly alike.

    Args:
        result: a comparison on some scenes, for its variance.
        margin: as a share.
        tests: how many comparisons Holm corrects for; the strictest level is taken.
        power: wanted.
        level: of all comparisons together, one-sided.
    """
    z = _NORMAL.inv_cdf(1 - level / tests) + _NORMAL.inv_cdf(power)
    return math.ceil(result.scenes * (z * result.error / margin) ** 2)


def power(result: Paired, margin: float, *, tests: int, level: float = 0.05) -> float:
    """Power of the non-inferiority test on these scenes where the two are truly alike; arguments as above."""
    return _NORMAL.cdf(margin / result.error - _NORMAL.inv_cdf(1 - level / tests))


Z95 = 1.959964


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = right / total, Z95**2
    middle, half = p + z2 / (2 * total), Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, (middle - half) / (1 + z2 / total)), min(1.0, (middle + half) / (1 + z2 / total))


def by_scene(right: Sequence[bool], scenes: Sequence[int], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean by a bootstrap that draws whole scenes."""
    _, group = np.unique(np.asarray(scenes), return_inverse=True)
    good, count = np.bincount(group, np.asarray(right, float)), np.bincount(group).astype(float)
    picks = np.random.default_rng(seed).integers(0, len(count), (draws, len(count)))
    means = good[picks].sum(1) / count[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
