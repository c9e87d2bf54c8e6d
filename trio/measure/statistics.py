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
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..core.record import Record
from .extras import require

__all__ = [
    "Bootstrap",
    "Estimate",
    "Paired",
    "holm",
    "needed_scenes",
    "paired",
    "power",
    "proportion",
    "scenes_to_reject",
    "smallest_p",
]

Values = NDArray[np.float64]
DRAWS = 2000
FLIPS = 10_000
#: Scenes below which percentiles of a bootstrap are too near to the mean.
FEW = 10
_NORMAL = NormalDist()


Method = Literal["bootstrap", "wilson"]


class Estimate(Record):
    """A mean with its 95% interval.

    Attributes:
        mean: a share from 0 to 1, a percentage, or a number: the field that holds the estimate says which.
        low: lower end of the interval.
        high: upper end.
        method: how the interval was found: by a bootstrap over scenes or images, or Wilson's; None where results of
            earlier versions do not say.
    """

    mean: float
    low: float
    high: float
    method: Method | None = None

    def __str__(self) -> str:
        """As ``96.2 (93.1 to 98.0)``."""
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"

    def signed(self) -> str:
        """The same with signs, for differences."""
        return f"{self.mean:+z.1f} ({self.low:+z.1f} to {self.high:+z.1f})"

    def percent(self) -> str:
        """A share as ``96.2% (93.1 to 98.0)``."""
        return f"{self.mean:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def points(self) -> str:
        """A difference of shares, in points, as ``+4.1 (+1.0 to +7.2)``."""
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"

    def plain(self) -> str:
        """As ``0.031 (0.020 to 0.045)``."""
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"

    def change(self) -> str:
        """A difference as ``-0.031 (-0.045 to -0.020)``."""
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def scaled(self, factor: float, digits: int) -> Estimate:
        """The same in another unit, rounded."""
        low, mean, high = (round(factor * value, digits) for value in (self.low, self.mean, self.high))
        return Estimate(mean=mean, low=low, high=high, method=self.method)


class Bootstrap:
    """Draws of whole scenes, shared by all rows."""

    def __init__(self, scenes: Sequence[int], draws: int = DRAWS, seed: int = 0, *, one_by_one: bool = False) -> None:
        """Draws scenes with replacement.

        Args:
            scenes: the scene of each question.
            draws: how many.
            seed: of the draws.
            one_by_one: draw scene after scene in place of all counts at once: the same distribution from other random
                numbers, those that published intervals of fidelity and of the zoo's cards were found with.
        """
        _, self._group = np.unique(np.asarray(scenes), return_inverse=True)
        self._number = number = int(self._group.max()) + 1
        generator = np.random.default_rng(seed)
        if one_by_one:
            picked = generator.integers(0, number, (draws, number))
            counts = np.stack([np.bincount(row, minlength=number) for row in picked])
        else:
            counts = generator.multinomial(number, np.full(number, 1 / number), size=draws)
        self._weights: Values = counts.astype(float)

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

    def number(self, values: Sequence[float] | Values, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean of any numbers with its interval."""
        given = np.asarray(values, float)
        part = np.ones(len(given), bool) if chosen is None else chosen
        return _percentiles(float(given[part].mean()), self.means(given, part))

    def mean(self, values: Sequence[float] | Values, chosen: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean of shares from 0 to 1 with its interval: Wilson's where all are 0 or all are 1."""
        given = np.asarray(values, float)
        picked = given if chosen is None else given[chosen]
        if (picked == picked[0]).all() and picked[0] in (0.0, 1.0):
            scenes = self.scenes(chosen)
            return proportion(round(float(picked.mean()) * scenes), scenes)
        return self.number(given, chosen)

    def share(self, values: Sequence[float]) -> Estimate:
        """As `mean`, and Wilson's interval too for shares of yes and no with one question a scene."""
        if len(values) == self._number and set(values) <= {0.0, 1.0}:
            return proportion(round(sum(values)), len(values))
        return self.mean(values)

    def difference(self, values: Values, other: Values, chosen: NDArray[np.bool_]) -> Estimate:
        """Mean paired difference with its interval."""
        return self.number(values - other, chosen)

    def retained(self, values: Values, full: Values, blind: Values, chosen: NDArray[np.bool_]) -> Estimate | None:
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


def _percentiles(mean: float, draws: Values) -> Estimate:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(mean=mean, low=float(low), high=float(high), method="bootstrap")


def proportion(right: int, total: int) -> Estimate:
    """The share of so many of so many, with Wilson's interval; from 0 to 1 where there are none.

    Raises:
        InputError: scipy is not installed.
    """
    if total == 0:
        return Estimate(mean=0.0, low=0.0, high=1.0, method="wilson")
    found = require("scipy.stats", "intervals").binomtest(right, total).proportion_ci(0.95, method="wilson")
    return Estimate(mean=right / total, low=float(found.low), high=float(found.high), method="wilson")


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
