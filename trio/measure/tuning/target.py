"""What a search is to reach: `agreement>=99%`, `flops<=33%`, `speed>=3x`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import InputError, did_you_mean

Direction = Literal[">=", "<="]

#: Metric -> how it is bounded, its unit and what it is. The first ones are qualities, the others costs.
QUALITIES: Mapping[str, str] = {
    "agreement": "share of prompts whose first token is the full model's",
    "answers": "share of prompts whose whole greedy answer is the full model's",
    "similarity": "mean edit similarity of the greedy answers, in percent",
}
COSTS: Mapping[str, tuple[Direction, str, str]] = {
    "flops": ("<=", "%", "FLOPs of prefill and tower, as a share of the full model's"),
    "tokens": ("<=", "%", "visual tokens averaged over the layers, as a share of the full model's"),
    "speed": (">=", "x", "measured time to the first token, full / compressed"),
}
FORMS = "agreement>=99%, answers>=95%, similarity>=98%, flops<=33%, tokens<=11%, speed>=3x"

_FORM = re.compile(r"\s*([A-Za-z]+)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]+)?)\s*([%x])\s*")


@dataclass(frozen=True)
class Bound:
    """One condition.

    Attributes:
        metric: one of `QUALITIES` or `COSTS`.
        direction: which side is good.
        value: a share from 0 to 1, or a ratio (speed).
    """

    metric: str
    direction: Direction
    value: float

    def met(self, found: float) -> bool:
        """Whether a value meets it; rounding of means is forgiven."""
        return found >= self.value - 1e-9 if self.direction == ">=" else found <= self.value + 1e-9

    def miss(self, found: float) -> float:
        """How far a value misses it, relative to the bound; 0 where it does not."""
        if self.met(found):
            return 0.0
        return abs(found - self.value) / max(self.value, 1e-9)

    def show(self, value: float) -> str:
        """A value in the bound's unit."""
        return f"{value:.2f}x" if self.metric == "speed" else f"{value:.1%}"

    def __str__(self) -> str:
        """As it was written."""
        number = f"{self.value:g}x" if self.metric == "speed" else f"{100 * self.value:g}%"
        return f"{self.metric}{self.direction}{number}"


@dataclass(frozen=True)
class Target:
    """All conditions; at most one on quality."""

    bounds: tuple[Bound, ...]

    @property
    def quality(self) -> str:
        """What quality means in the search: the metric that a bound names, else ``agreement``."""
        return next((bound.metric for bound in self.bounds if bound.metric in QUALITIES), "agreement")

    @property
    def bounds_quality(self) -> bool:
        """Whether quality is given, so that the search is for the least cost."""
        return any(bound.metric in QUALITIES for bound in self.bounds)

    @property
    def timed(self) -> bool:
        """Whether times have to be measured."""
        return any(bound.metric == "speed" for bound in self.bounds)

    def met(self, found: Mapping[str, float], errors: Mapping[str, float] | None = None) -> bool:
        """Whether values by metric meet every bound, those with a standard error even if they are that much lower."""
        less = errors or {}
        return all(bound.met(found[bound.metric] - less.get(bound.metric, 0.0)) for bound in self.bounds)

    def miss(self, found: Mapping[str, float]) -> float:
        """How far values by metric miss the bounds, added up; 0 where they are met."""
        return sum(bound.miss(found[bound.metric]) for bound in self.bounds)

    def show(self, found: Mapping[str, float]) -> str:
        """Quality, FLOPs and what else is bounded: ``agreement 97.2%, flops 44.5%, speed 2.02x``."""
        shown = dict.fromkeys([self.quality, "flops", *(bound.metric for bound in self.bounds)])
        return ", ".join(
            f"{metric} {found[metric]:.2f}x" if metric == "speed" else f"{metric} {found[metric]:.1%}"
            for metric in shown
        )

    def __str__(self) -> str:
        """As it was written."""
        return " and ".join(map(str, self.bounds))


def parse_target(texts: str | Sequence[str]) -> Target:
    """Reads conditions such as ``agreement>=99%`` (at least one; each metric once, one quality).

    Raises:
        InputError: one is in no known form, impossible, or given twice.
    """
    written = [texts] if isinstance(texts, str) else list(texts)
    bounds = [_parse(text) for text in written]
    if not bounds:
        raise InputError(f"target: there is none; give at least one, such as {FORMS}.")
    metrics = [bound.metric for bound in bounds]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise InputError(f"target: {metric} is bounded {metrics.count(metric)} times; give one bound.")
    if len(set(metrics) & set(QUALITIES)) > 1:
        raise InputError(f"target: give one of {', '.join(QUALITIES)}; the search needs one meaning of quality.")
    return Target(tuple(bounds))


def _parse(text: str) -> Bound:
    match = _FORM.fullmatch(text)
    if match is None:
        raise InputError(f"target {text!r}: this is no condition; write for example {FORMS}.")
    metric, sign, number, unit = match[1].lower(), match[2], float(match[3]), match[4]
    known = [*QUALITIES, *COSTS]
    if metric not in known:
        raise InputError(
            f"target {text!r}: {metric!r} is not measured. {did_you_mean(metric, known)}Known: {', '.join(known)}."
        )
    direction, wanted, _ = COSTS.get(metric, (">=", "%", ""))
    if (sign, unit) != (direction, wanted):
        raise InputError(f"target {text!r}: {metric} takes a bound of the form {metric}{direction}NUMBER{wanted}.")
    value = number if unit == "x" else number / 100
    if not value > 0 or (unit == "%" and value > 1):
        raise InputError(f"target {text!r}: the number is out of range; a share is above 0% and at most 100%.")
    return Bound(metric, direction, value)
