"""Means with 95% intervals; samples about one picture are drawn together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..statistics import by_scene, wilson
from .report import Estimate


def estimate(values: Sequence[float], pictures: Sequence[str]) -> Estimate:
    """The mean of numbers, with an interval by a bootstrap over pictures (2000 draws, seeded).

    Args:
        values: one a sample.
        pictures: the picture of each.
    """
    low, high = by_scene(list(values), _numbered(pictures))  # type: ignore[arg-type]  # its arithmetic is a mean's
    return Estimate(value=float(np.mean(values)), low=low, high=high, method="bootstrap")


def share(values: Sequence[float], pictures: Sequence[str]) -> Estimate:
    """The mean of numbers from 0 to 1, mostly 1.

    Shares of yes and no with one sample a picture have Wilson's interval. So do values that are all 1 (or all 0), each
    picture counted once: a bootstrap of them has no width.
    """
    count = len(set(pictures))
    alike = len(set(values)) == 1 and values[0] in (0.0, 1.0)
    if alike or (count == len(pictures) and set(values) <= {0.0, 1.0}):
        hits = round(count * float(np.mean(values)))
        low, high = wilson(hits, count)
        return Estimate(value=float(np.mean(values)), low=low, high=high, method="wilson")
    return estimate(values, pictures)


def _numbered(pictures: Sequence[str]) -> list[int]:
    number = {name: index for index, name in enumerate(dict.fromkeys(pictures))}
    return [number[name] for name in pictures]
