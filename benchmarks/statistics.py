"""Accuracies and differences with intervals; questions about one scene are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import SEEDS
from trio.zoo.evaluate import by_scene, wilson

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean in percent (or a difference in points) with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Mean and interval."""
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"

    def signed(self) -> str:
        """The same with signs, for differences."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def verdict(self) -> str:
        """Which side of zero the interval lies on."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "not told apart"


class Answers:
    """The answers of one results file."""

    def __init__(self, results: dict[str, Any]) -> None:
        """Reads the rows."""
        self.results = results
        self.scene = np.asarray(results["questions"]["scene"])
        self.kind = np.asarray(results["questions"]["kind"])
        self._right = {row: np.asarray([c == "1" for c in text], float) for row, text in results["right"].items()}

    @property
    def kinds(self) -> list[str]:
        """Types of question, in their usual order."""
        return list(dict.fromkeys(self.kind.tolist()))

    def __contains__(self, row: str) -> bool:
        """Whether the row was measured."""
        return row in self._right

    def right(self, row: str) -> Values:
        """1 or 0 for each question; of ``PLACE/SHARE/random`` the mean over its draws."""
        if row.endswith("/random"):
            mean: Values = np.mean(self.draws(row), axis=0)
            return mean
        return self._right[row]

    def draws(self, row: str) -> list[Values]:
        """The single draws of a random row."""
        return [self._right[f"{row} {seed}"] for seed in SEEDS]

    def accuracy(self, row: str, kind: str | None = None) -> Estimate:
        """Accuracy in percent, overall or on one type of question.

        A type has one question a scene, so that a row's interval is Wilson's there. So it is where all answers are
        right, each scene counted once: a bootstrap of them has no width.
        """
        right = self.right(row)
        if kind is None and (right == 1).all():
            chosen = np.ones(len(set(self.scene.tolist())))
        elif kind is None or row.endswith("/random"):
            return self._estimate(right, kind)
        else:
            chosen = right[self.kind == kind]
        low, high = wilson(int(chosen.sum()), len(chosen))
        return Estimate(100 * float(chosen.mean()), 100 * low, 100 * high)

    def difference(self, row: str, other: str, kind: str | None = None) -> Estimate:
        """Accuracy of a row minus that of another on the same questions, in points."""
        return self._estimate(self.right(row) - self.right(other), kind)

    def spread(self, row: str) -> tuple[float, float]:
        """Lowest and highest accuracy among the draws of a random row, in percent."""
        each = [100 * float(draw.mean()) for draw in self.draws(row)]
        return min(each), max(each)

    def _estimate(self, values: Values, kind: str | None) -> Estimate:
        chosen = np.ones(len(values), bool) if kind is None else self.kind == kind
        picked: Sequence[Any] = values[chosen].tolist()
        low, high = by_scene(picked, self.scene[chosen].tolist())
        return Estimate(100 * float(np.mean(picked)), 100 * low, 100 * high)
