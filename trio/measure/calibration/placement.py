"""Where stages stand: a rule that reads it off a drop-all curve.

A token that is dropped after layer d is lost to the layers behind d; what the layers up to d took in stays. So the fall
of the drop-all curve from one depth to the next says how much of the image is taken in by the layer between them: its
*absorption*. A schedule that leaves the share n[l] of the tokens in layer l gets the loss ``sum(a[l] / n[l])``, with
a[l] the absorption of layer l: layers that take in much are to see many tokens, and of few tokens each one counts more
than of many. Shares cannot grow from layer to layer, and their mean is the budget. Between two stages the best share is
then proportional to the square root of the mean absorption of the layers there; all places for the stages are tried.

What the curve does not see: visual tokens also look at each other in layers where no text looks at them, and scorers
see more in deeper layers. A part of the absorption (`EVEN`) is spread evenly over the layers for that, and because a
curve of a few images is rough. The rule makes candidates; which of them is good is measured.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations, pairwise

from ...errors import SpecError
from ...spec import Budget, Keep, PipelineSpec, StageSpec
from ...spec.schedule import ResolvedSchedule
from ..extras import require

__all__ = ["EVEN", "PUBLISHED", "Placement", "absorption", "candidates", "placed", "shares"]

#: Part of the absorption that is spread evenly over the layers.
EVEN = 0.1
#: The published schedule for 64 of 576 tokens: stages as shares of the depth, and what each later one keeps of what
#: reaches it (arXiv 2602.04657: 92, 54 and 22 tokens after layers 1, 10 and 15 of 32), as in the spec `trio-11`.
PUBLISHED = ((0.032, 0.313, 0.469), (0.587, 0.407))


@dataclass(frozen=True)
class Placement:
    """A schedule without its budget.

    Attributes:
        name: what it is called.
        layers: of each stage, decoder layers already run.
        ratios: of each stage behind the first, the share that it keeps of what reaches it.
    """

    name: str
    layers: tuple[int, ...]
    ratios: tuple[float, ...]

    def reach(self, depth: int) -> tuple[float, float]:
        """The mean shares over so many layers between which every budget can be met."""
        widths = [end - start for start, end in pairwise([*self.layers, depth])]
        below = accumulate(self.ratios, operator.mul, initial=1.0)
        first = self.layers[0] / depth
        return first, first + sum(width * share for width, share in zip(widths, below, strict=True)) / depth

    def spec(self, base: PipelineSpec, budget: str) -> PipelineSpec:
        """The parts of a spec at these places; the first share is solved from the budget.

        Args:
            base: what has the parts: a stage has those of the base's stage of the same number, or of its last one.
            budget: share of the visual tokens averaged over the layers, such as "11.1%".

        Raises:
            SpecError: two stages stand at one layer.
        """
        stages = []
        for number, layer in enumerate(self.layers):
            part = base.stages[min(number, len(base.stages) - 1)]
            keep = Keep(share=_percent(self.ratios[number - 1]), of="current") if number else Keep(auto=True)
            stages.append(
                StageSpec(
                    after_layer=layer, keep=keep, if_fewer=part.if_fewer, scorer=part.scorer, selector=part.selector
                )
            )
        return PipelineSpec(
            name=self.name,
            source=base.source,
            stages=stages,
            positions=base.positions,
            newlines=base.newlines,
            budget=Budget(average=budget),
        )


def placed(name: str, schedule: ResolvedSchedule, tokens: int) -> Placement:
    """The placement of a resolved schedule, as an image of so many tokens sees it.

    Raises:
        BudgetError: the schedule cannot be met for such an image.
        SpecError: a stage leaves none of its tokens.
    """
    counts = schedule.stage_counts(tokens)
    if 0 in counts:
        raise SpecError(f"{name}: a stage leaves no token of {tokens}, so its schedule cannot be scaled to a budget.")
    return Placement(name, schedule.layers, tuple(after / before for before, after in pairwise(counts)))


def absorption(divergence: Sequence[float]) -> list[float]:
    """What share of an image is taken in after each depth.

    Args:
        divergence: for each depth d from 0 to L, how far answers are off where all tokens are dropped after layer d, 0
            or more; the last one is of the full model.

    Returns:
        L + 1 numbers that never fall, from 0 to 1, of the nearest divergence that never rises (least squares). All
        layers take in alike where nothing is off at any depth.

    Raises:
        InputError: scipy is not installed.
    """
    last = len(divergence) - 1
    isotonic = require("scipy.optimize", "calibration").isotonic_regression
    fitted = [float(value) for value in isotonic(divergence, increasing=False).x]
    span = fitted[0] - fitted[-1]
    if span <= 0:
        return [depth / last for depth in range(last + 1)]
    return [(fitted[0] - value) / span for value in fitted]


def shares(absorbed: Sequence[float], layers: Sequence[int], budget: float) -> tuple[float, ...] | None:
    """What share of an image's tokens each stage leaves, for the least loss; see the module.

    Args:
        absorbed: see `absorption`.
        layers: of the stages, rising.
        budget: mean share over all layers.

    Returns:
        Falling shares, below 1; None where no such shares are best: then other places are better.
    """
    depth = len(absorbed) - 1
    room = budget * depth - layers[0]
    if room <= 0:
        return None
    roots = [(math.sqrt(taken / width), width) for taken, width in _segments(absorbed, layers)]
    total = sum(root * width for root, width in roots)
    found = tuple(room * root / total for root, _ in roots)
    grows = any(later >= earlier for earlier, later in pairwise(found))
    return None if grows or found[0] >= 1 else found


def _segments(absorbed: Sequence[float], layers: Sequence[int]) -> list[tuple[float, int]]:
    """Behind each stage: what the layers up to the next one take in, the even part included, and their number."""
    depth = len(absorbed) - 1
    ends = pairwise([*layers, depth])
    return [
        ((1 - EVEN) * (absorbed[end] - absorbed[start]) + EVEN * (end - start) / depth, end - start)
        for start, end in ends
    ]


def _by_absorption(
    name: str, absorbed: Sequence[float], budget: float, stages: int, allowed: Sequence[int]
) -> Placement | None:
    """The best placement of so many stages at most; None where no stage can stand."""
    least, found = math.inf, None
    most = budget * (len(absorbed) - 1)
    for layers in chain.from_iterable(combinations(allowed, number) for number in range(1, stages + 1)):
        kept = shares(absorbed, layers, budget) if layers[0] < most else None
        if kept is None:
            continue
        parts = _segments(absorbed, (0, *layers))
        loss = sum(taken / share for (taken, _), share in zip(parts, (1.0, *kept), strict=True))
        if loss < least:  # of equal ones that with the fewest stages
            least = loss
            found = Placement(name, layers, tuple(after / before for before, after in pairwise(kept)))
    return found


def candidates(absorbed: Sequence[float], budget: float, allowed: Iterable[int]) -> list[Placement]:
    """Up to four placements that can meet a budget, each at other layers or with other shares.

    `input`: one stage, as early as it can stand. `published`: the shape of the published schedule, in shares of the
    depth. `two-by-curve` and `three-by-curve`: by the rule of this module, with so many stages at most.

    Args:
        absorbed: see `absorption`.
        budget: mean share over all layers.
        allowed: layers after which a stage can stand.
    """
    depth, places = len(absorbed) - 1, sorted(allowed)
    published = tuple(int(share * depth) for share in PUBLISHED[0])
    made = [
        Placement("input", tuple(places[:1]), ()),
        Placement("published", published, PUBLISHED[1]) if set(published) <= set(places) else None,
        _by_absorption("two-by-curve", absorbed, budget, 2, places),
        _by_absorption("three-by-curve", absorbed, budget, 3, places),
    ]
    found: dict[tuple[tuple[int, ...], tuple[float, ...]], Placement] = {}
    for one in made:
        if one is None or not one.layers or len(set(one.layers)) < len(one.layers):
            continue
        low, high = one.reach(depth)
        if low < budget < high:
            found.setdefault((one.layers, tuple(round(ratio, 3) for ratio in one.ratios)), one)
    return list(found.values())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
