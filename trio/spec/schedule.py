"""What a spec means for a language model of a given depth: the layers of the stages, and the tokens in every layer.

Pure Python, no torch. Sources: the retention that papers count is the number of visual tokens averaged over the
decoder layers (TRIO, arXiv 2602.04657, section 4; FastV, arXiv 2403.06764).

The solver. Let an image start with n tokens, let w_j be the number of layers that run between reduction j and the next
one, and let every `auto` reduction keep the same fraction f of what reaches it. The average over the layers is then a
continuous, non-decreasing function of f, so that bisection finds the f that meets `budget.average`; the counts are
rounded, and single counts moved by one where rounding left the average more than half a token off. An `auto` reduction
keeps at least one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from ..errors import BudgetError, InputError, SpecError
from . import Group, Keep, PipelineSpec
from .rules import parse_share

__all__ = ["ResolvedSchedule", "resolve"]

MAX_ERROR = Fraction(1, 2)  # tokens by which a solved average may miss its target
SHARE_ERROR = Fraction(2, 1000)  # by which the average of written shares may miss a stated one: 1.2 tokens of 576


@dataclass(frozen=True)
class Reduction:
    """One place where tokens go: the compressor (before layer 0) or a stage.

    Attributes:
        spec_path: where it stands in the spec, for messages.
        layer: decoder layers already run when it acts.
        keep: how many tokens it keeps; None for a compressor that decides its own count.
        strict: whether fewer tokens than the count are an error.
    """

    spec_path: str
    layer: int
    keep: KeepRule | None
    strict: bool


@dataclass(frozen=True)
class KeepRule:
    """A hashable `Keep`: exactly one of count, share (an exact fraction) and neither (auto); `down` rounds a share."""

    count: int | None
    share: Fraction | None
    of_current: bool
    per: Group
    down: bool = False

    @property
    def auto(self) -> bool:
        """Whether the count is solved from the budget."""
        return self.count is None and self.share is None


@dataclass(frozen=True)
class ResolvedSchedule:
    """A spec resolved for a depth.

    Attributes:
        num_layers: decoder layers of the model.
        layers: for each stage, the number of layers already run when it acts; strictly increasing.
        target: the stated average: tokens for each image (int or float), an exact share (Fraction), or None.
    """

    num_layers: int
    layers: tuple[int, ...]
    compressor: Reduction | None
    stages: tuple[Reduction, ...]
    target: int | float | Fraction | None

    def group(self, stage: int) -> Literal["image", "sample"]:
        """What the count of a stage is for: each image, or all images of a sample together."""
        keep = self.stages[stage].keep
        return "sample" if keep is not None and keep.per == "sample" else "image"

    def compressor_group(self) -> Group:
        """What the compressor's count is for."""
        return self.compressor.keep.per if self.compressor is not None and self.compressor.keep is not None else "image"

    @property
    def known(self) -> bool:
        """Whether counts follow from the number of an image's tokens alone, without its tiles or its content."""
        if self.compressor is None:
            return True
        keep = self.compressor.keep
        return keep is not None and not (keep.per == "tile" and keep.count is not None)

    def keep_count(self, stage: int, started: int, current: int) -> int:
        """Tokens that a stage keeps of one group.

        Args:
            stage: index of the stage.
            started: visual tokens that the group had before any reduction, the compressor included.
            current: visual tokens of the group that reach the stage.

        Raises:
            BudgetError: fewer tokens reach the stage than it is to keep, and the spec says `if_fewer: error`; or a
                budget cannot be met for `started` tokens.
        """
        return self._kept(self.stages[stage], self._solved(started).get(self.stages[stage].spec_path), started, current)

    def compressed_count(self, started: int) -> int | None:
        """Tokens that the compressor leaves of `started`; None where it decides its own count; `started` without one.

        Raises:
            BudgetError: as `keep_count`.
        """
        if self.compressor is None:
            return started
        if self.compressor.keep is None:
            return None
        return self._kept(self.compressor, self._solved(started).get(self.compressor.spec_path), started, started)

    def stage_counts(self, started: int, *, compressed: int | None = None) -> tuple[int, ...]:
        """Tokens that each stage leaves of one image that starts with `started`.

        Args:
            started: visual tokens before any reduction.
            compressed: what the compressor left, where that does not follow from the tokens alone (see `known`).

        Raises:
            BudgetError: as `keep_count`.
            InputError: `known` is False and `compressed` was not given.
        """
        current = self._entering(started, compressed)
        kept = []
        for stage in range(len(self.stages)):
            current = self.keep_count(stage, started, current)
            kept.append(current)
        return tuple(kept)

    def counts(self, started: int, *, compressed: int | None = None) -> tuple[int, ...]:
        """Tokens of one image in each of the `num_layers` layers; arguments and errors as `stage_counts`."""
        kept = self.stage_counts(started, compressed=compressed)
        current, ends = self._entering(started, compressed), (*self.layers, self.num_layers)
        result: list[int] = []
        for end, after in zip(ends, (*kept, 0), strict=True):
            result += [current] * (end - len(result))
            current = after
        return tuple(result)

    def average(self, started: int, *, compressed: int | None = None) -> float:
        """Tokens of one image averaged over the layers; arguments and errors as `stage_counts`."""
        return sum(self.counts(started, compressed=compressed)) / self.num_layers

    def check(self, started: int) -> None:
        """Check the stated budget for one image that starts with `started` tokens.

        An image that is smaller than a count keeps all its tokens, and its average may then lie below the budget.

        Raises:
            BudgetError: the average misses the budget; the message gives what the counts amount to.
        """
        if self.target is None or not self.known:
            return
        average = Fraction(sum(self.counts(started)), self.num_layers)
        target = self.target * started if isinstance(self.target, Fraction) else Fraction(self.target)
        slack = max(MAX_ERROR, SHARE_ERROR * started) if isinstance(self.target, Fraction) else MAX_ERROR
        if any(rule.keep is not None and rule.keep.count is None for rule in self._all()):
            slack = max(slack, Fraction(1))  # a share and a solved count keep at least one token
        small = any(r.keep is not None and r.keep.count is not None and r.keep.count >= started for r in self._all())
        if average > target + slack or (average < target - slack and not small and target <= started):
            raise BudgetError(
                f"budget.average: {_say(self.target)} was promised, but an image of {started} tokens keeps "
                f"{float(average):.2f} on average ({float(average / started):.1%}) over {self.num_layers} layers. "
                "Change the counts, or write `keep: auto` to have them solved."
            )

    def _all(self) -> tuple[Reduction, ...]:
        return (self.compressor, *self.stages) if self.compressor is not None else self.stages

    def _entering(self, started: int, compressed: int | None) -> int:
        if started < 0:
            raise InputError(f"started: found {started}; an image has 0 or more visual tokens.")
        count = self.compressed_count(started) if self.known else None
        if count is None:
            if compressed is None:
                raise InputError(
                    "the compressor decides its own count, or counts by tile, so the tokens by layer depend on the "
                    "image; give `compressed`."
                )
            return compressed
        return count

    def _solved(self, started: int) -> dict[str, int]:
        rules = self._all()
        if self.target is None or started == 0 or not any(rule.keep is not None and rule.keep.auto for rule in rules):
            return {}
        return _solve(self, started)

    def _kept(self, rule: Reduction, solved: int | None, started: int, current: int) -> int:
        assert rule.keep is not None  # callers handle compressors that decide for themselves
        count = solved if rule.keep.auto else _plain(rule.keep, started, current)
        if count is None:  # auto of an image without tokens
            return 0
        if count > current and rule.strict:
            raise BudgetError(
                f"{rule.spec_path}: {count} tokens are to be kept, but only {current} of {started} reach it, and the "
                "spec says "
                "if_fewer: error. Use a larger image, a lower count, or if_fewer: keep-all."
            )
        return min(count, current)


def _plain(keep: KeepRule, started: int, current: int) -> int:
    """The count of an explicit rule, not limited to what is there; a share keeps at least one token of any."""
    if keep.count is not None:
        return keep.count
    assert keep.share is not None  # auto is the solver's
    base = current if keep.of_current else started
    return max(int(keep.share * base) if keep.down else _round(keep.share * base), min(1, base))


def _round(value: Fraction) -> int:
    return int(value + Fraction(1, 2))  # half up; values are never negative


def _say(target: int | float | Fraction) -> str:
    return f"{float(target):.2%}" if isinstance(target, Fraction) else f"{target:g} tokens"


# The solver ----------------------------------------------------------------------------------------------------------


def _weights(schedule: ResolvedSchedule) -> list[int]:
    """Layers that run after each reduction and before the next one; the first entry is for what comes before all."""
    edges = [0, *(rule.layer for rule in schedule._all()), schedule.num_layers]
    return [after - before for before, after in pairwise(edges)]


def _real_total(schedule: ResolvedSchedule, started: Fraction, fraction: Fraction | float) -> float:
    """Token-layers of one image where every auto reduction keeps `fraction`, without rounding."""
    current: float = float(started)
    weights = _weights(schedule)
    total = weights[0] * current
    for rule, weight in zip(schedule._all(), weights[1:], strict=True):
        keep = rule.keep
        assert keep is not None  # auto beside a compressor that decides for itself is refused in the spec
        if keep.auto:
            count = current * float(fraction)
        elif keep.count is not None:
            count = float(keep.count)
        else:
            count = float(keep.share or 0) * (current if keep.of_current else float(started))
        current = min(current, count)
        total += weight * current
    return total


def _whole(schedule: ResolvedSchedule, started: int, chosen: list[int | None]) -> tuple[list[int], int]:
    """Counts after each reduction, and token-layers, for whole numbers; `chosen` holds the auto counts."""
    current, weights = started, _weights(schedule)
    total, counts = weights[0] * started, []
    for rule, weight, count in zip(schedule._all(), weights[1:], chosen, strict=True):
        assert rule.keep is not None  # as in _real_total
        current = min(current, count if count is not None else _plain(rule.keep, started, current))
        counts.append(current)
        total += weight * current
    return counts, total


@lru_cache(maxsize=4096)
def _solve(schedule: ResolvedSchedule, started: int) -> dict[str, int]:
    """The counts of the auto reductions for an image of `started` tokens, by spec path; callers must not change it."""
    assert schedule.target is not None  # auto without a budget is refused in the spec
    layers = schedule.num_layers
    average = schedule.target * started if isinstance(schedule.target, Fraction) else Fraction(schedule.target)
    goal = average * layers
    least, most = (_real_total(schedule, Fraction(started), fraction) for fraction in (0.0, 1.0))
    slack = float(MAX_ERROR * layers)
    rules = schedule._all()
    if float(goal) < least - slack:
        raise _unreachable(schedule, started, least / layers, most / layers)
    if float(goal) > most + slack and any(rule.strict for rule in rules if rule.keep is not None and rule.keep.auto):
        raise _unreachable(schedule, started, least / layers, most / layers)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _real_total(schedule, Fraction(started), middle) < float(goal) else (low, middle)
    chosen: list[int | None] = []
    current = float(started)
    for rule in rules:
        assert rule.keep is not None  # as in _real_total
        keep = rule.keep
        if keep.auto:
            current *= high
            chosen.append(max(1, int(current + 0.5)))
        else:
            chosen.append(None)
            share = float(keep.share or 0) * (current if keep.of_current else started)
            current = min(current, float(keep.count) if keep.count is not None else share)
    chosen = _polish(schedule, started, chosen, goal)
    return {rule.spec_path: count for rule, count in zip(rules, chosen, strict=True) if count is not None}


def _polish(schedule: ResolvedSchedule, started: int, chosen: list[int | None], goal: Fraction) -> list[int | None]:
    """Move single auto counts by one while that brings the average nearer and it is more than half a token off."""
    best = list(chosen)
    error = abs(_whole(schedule, started, best)[1] - goal)
    while error > MAX_ERROR * schedule.num_layers:
        tries = []
        for index, count in enumerate(best):
            if count is None:
                continue
            for changed in (count - 1, count + 1):
                if 1 <= changed <= started:
                    one = [*best[:index], changed, *best[index + 1 :]]
                    tries.append((abs(_whole(schedule, started, one)[1] - goal), one))
        if not tries or min(tries, key=lambda pair: pair[0])[0] >= error:
            break
        error, best = min(tries, key=lambda pair: pair[0])
    return best


def _unreachable(schedule: ResolvedSchedule, started: int, least: float, most: float) -> BudgetError:
    assert schedule.target is not None  # only called for a stated budget
    return BudgetError(
        f"budget.average: {_say(schedule.target)} cannot be met for an image of {started} tokens on "
        f"{schedule.num_layers} layers; between {least:.2f} ({least / started:.1%}) and {most:.2f} "
        f"({most / started:.1%}) is "
        "reachable. Move the first stage to an earlier layer, change the explicit counts, or change the budget."
    )


# From a spec ---------------------------------------------------------------------------------------------------------


def resolve(spec: PipelineSpec, num_layers: int) -> ResolvedSchedule:
    """Resolve a spec for a language model of `num_layers` decoder layers.

    Raises:
        SpecError: a stage lies at or after the last layer, two stages meet at one layer, or they are out of order.
        BudgetError: the counts contradict the stated average, or the average cannot be met, for images of any size.
    """
    if num_layers < 1:
        raise InputError(f"num_layers: found {num_layers}; a language model has at least one decoder layer.")
    stages: list[Reduction] = []
    for index, stage in enumerate(spec.stages):
        spec_path = f"stages[{index}]"
        layer = _layer(stage.after_layer, num_layers, spec_path)
        if stages and layer <= stages[-1].layer:
            meet = "two stages cannot act at one layer" if layer == stages[-1].layer else "the stages are out of order"
            raise SpecError(
                f"{spec_path}.after_layer: {stage.after_layer!r} is layer {layer} of {num_layers}, and "
                f"{stages[-1].spec_path} ({spec.stages[index - 1].after_layer!r}) is layer {stages[-1].layer}; "
                f"{meet}. Move one of them, or leave one out for a model of this depth.",
                spec_path=f"{spec_path}.after_layer",
            )
        stages.append(Reduction(spec_path, layer, _rule(stage.keep), stage.if_fewer == "error"))
    compressor = None
    if spec.compressor is not None:
        keep = _rule(spec.compressor.keep) if spec.compressor.keep is not None else None
        compressor = Reduction("compressor", 0, keep, spec.compressor.if_fewer == "error")
    target = None if spec.budget is None else spec.budget.fraction
    if spec.budget is not None and target is None:
        average = spec.budget.average
        assert not isinstance(average, str)  # a share has a fraction
        schedule = ResolvedSchedule(num_layers, tuple(s.layer for s in stages), compressor, tuple(stages), average)
    else:
        schedule = ResolvedSchedule(num_layers, tuple(s.layer for s in stages), compressor, tuple(stages), target)
    _check_any_size(schedule)
    return schedule


def _layer(after: int | str, num_layers: int, spec_path: str) -> int:
    layer = after if isinstance(after, int) else int(parse_share(after) * num_layers)
    if layer >= num_layers:
        raise SpecError(
            f"{spec_path}.after_layer: found {after!r}, but the model has {num_layers} decoder layers, so nothing "
            f'would run after it; allowed are 0 to {num_layers - 1}, or a share of the depth such as "50%".',
            spec_path=f"{spec_path}.after_layer",
        )
    return layer


def _rule(keep: Keep) -> KeepRule:
    return KeepRule(keep.count, keep.fraction, keep.of == "current", keep.per, keep.rounding == "down")


def _check_any_size(schedule: ResolvedSchedule) -> None:
    """Refuse what is wrong for every image: shares of shares, and counts behind a fixed number of tokens."""
    rules = schedule._all()
    if schedule.target is None or any(r.keep is None or r.keep.per != "image" for r in rules):
        return
    keeps = [rule.keep for rule in rules if rule.keep is not None]
    if isinstance(schedule.target, Fraction):
        if all(keep.count is None for keep in keeps):
            _check_range(schedule, 10_000, float(schedule.target) * 10_000, float(SHARE_ERROR) * 10_000)
    elif rules and rules[0].layer == 0 and keeps[0].count is not None:
        _check_range(schedule, 1_000_000, float(schedule.target), float(MAX_ERROR))
    elif not any(keep.auto for keep in keeps) and keeps[0].count is not None:
        # The smallest image that reaches the first count unclipped has the lowest average.
        lowest = _real_total(schedule, Fraction(keeps[0].count), 0.0) / schedule.num_layers
        if lowest > float(schedule.target) + float(MAX_ERROR):
            raise BudgetError(
                f"budget.average: the counts contradict the stated {_say(schedule.target)}: on {schedule.num_layers} "
                "layers "
                f"they amount to at least {lowest:.2f}. Change the counts or the budget, or write `keep: auto`."
            )


def _check_range(schedule: ResolvedSchedule, started: int, target: float, slack: float) -> None:
    least, most = (_real_total(schedule, Fraction(started), f) / schedule.num_layers for f in (0.0, 1.0))
    if least - slack <= target <= most + slack:
        return
    assert schedule.target is not None  # the caller looked
    share = isinstance(schedule.target, Fraction)
    low, high = (f"{value / started:.2%}" if share else f"{value:.2f} tokens" for value in (least, most))
    if any(rule.keep is not None and rule.keep.auto for rule in schedule._all()):
        raise BudgetError(
            f"budget.average: {_say(schedule.target)} cannot be met on {schedule.num_layers} layers; between {low} "
            f"and {high} "
            "is reachable. Move the first stage to an earlier layer, change the explicit counts, or change the budget."
        )
    raise BudgetError(
        f"budget.average: the counts contradict the stated {_say(schedule.target)}: on {schedule.num_layers} layers "
        "they "
        f"amount to {low}. Change the counts or the budget, or write `keep: auto`."
    )
