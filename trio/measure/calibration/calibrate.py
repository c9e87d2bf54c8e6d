"""Places stages by a model's drop-all curve, chooses among a few schedules, and judges the choice on unseen images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import DEFAULT_SPEC, __version__
from ...adapters.base import Adapter
from ...errors import InputError, SpecError, TrioError
from ...pipeline import Pipeline
from ...spec import Budget, Keep, PipelineSpec, load_spec, shipped_specs
from ...spec.rules import parse_share
from ...spec.schedule import resolve
from ..answering import GreedyAnswerer
from ..encoding import LIMIT
from ..extras import require
from ..fidelity import PromptSample
from ..fidelity.floor import random_floor
from ..statistics import Estimate
from ..tuning.tune import split
from .curve import curve_of
from .placement import candidates, placed
from .report import CalibrationReport, CalibrationRow, UnseenComparison, Verdict
from .samples import CalibrationSet, Contender

__all__ = ["budget_share", "calibrate", "checked_base", "verdict_of"]

#: Draws of the random tokens; batches take them in turn.
DRAWS = 5


def calibrate(
    model: Any,
    processor: Any,
    samples: Sequence[PromptSample],
    *,
    budget: str = "11.1%",
    base: str | Path | Mapping[str, Any] | PipelineSpec = DEFAULT_SPEC,
    held_out: float = 0.5,
    max_new_tokens: int = 32,
    batch_size: int = 4,
    seed: int = 0,
    even_if_worse: bool = False,
    name: str | None = None,
    encoded_bytes: int = LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> CalibrationReport:
    """A schedule for a budget that fits when a model takes images in, and what it does on images that it has not seen.

    On one half of the images the drop-all curve is measured (`drop_all_curve`), and the schedules that follow from it
    (`trio.measure.calibration.placement`) and the shipped one are held against the full model's own answers. The one
    whose KL has the lowest upper end is asked again on the other half, beside the shipped one and random tokens at the
    same places.

    Args:
        model: a vision-language model of transformers, in evaluation mode.
        processor: its processor.
        samples: what to ask; a few dozen images, at least two. No labels are needed.
        budget: share of the visual tokens averaged over the layers, such as "11%".
        base: spec whose parts are used: scorers, selectors, positions. The comparison is with this spec at the budget;
            of the default, with the shipped spec for the budget where there is one.
        held_out: share of the images for the verdict.
        max_new_tokens: longest answer of the full model.
        batch_size: samples in a batch.
        seed: of the split and the random tokens.
        even_if_worse: the report's spec has the chosen schedule also where it is worse than the shipped one.
        name: of the model, for the report and the spec's name.
        encoded_bytes: features of a batch's images that are kept for the next schedule, on the model's device.
        progress: told (what is being done, batches done, batches in all).

    Raises:
        InputError: an argument is wrong.
        SpecError: the base has no stages, or more than stages.
        BudgetError: the budget cannot be met by the base.
        UnsupportedModelError: no adapter takes the model, or the base's parts do not fit it.
    """
    require("scipy.stats", "calibration")  # missing, it should not cost the answers
    budget_share(budget)
    parts = checked_base(load_spec(base))
    seen, unseen = split(samples, held_out, seed)
    answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
    adapter, called = answerer.adapter, name or type(answerer.adapter.model).__name__
    allowed, reasons = _allowed(adapter, parts)

    def steps(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    seen_set, unseen_set = (
        CalibrationSet(answerer, some, batch_size=batch_size, encoded_bytes=encoded_bytes) for some in (seen, unseen)
    )
    curve = curve_of(seen_set, parts.positions, called, steps("drop-all curve"))
    notes = [*reasons, *curve.notes]
    tokens = max(1, round(curve.visual_tokens))
    shipped = _shipped(parts, budget, len(adapter.layers), tokens)
    tried = _tried(curve.absorbed, parts, shipped, budget, allowed, adapter, tokens, notes)
    seen_set.ask(tried, steps("schedules"))
    best = _best(seen_set, tried)
    if seen_set.unknown:
        notes.append(f"FLOPs are not known: {seen_set.unknown}")

    chosen = Contender.of([best.spec], adapter)
    chance = Contender.of([random_floor(best.spec, seed=seed + draw) for draw in range(DRAWS)], adapter)
    same = best.spec is shipped
    judged = [chosen, chance, *([] if same else [Contender.of([shipped], adapter)])]
    unseen_set.ask(judged, steps("unseen images"))
    against = _compared(unseen_set, chosen, judged[-1]) if not same else _itself(shipped.name)
    written = shipped if against.verdict == "worse" and not even_if_worse else best.spec
    return CalibrationReport(
        model=called,
        budget=budget.strip(),
        base=parts.name,
        shipped=shipped.name,
        versions={
            "trio-vlm": __version__,
            **{package: metadata.version(package) for package in ("torch", "transformers")},
        },
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        calibration_images=_names(seen),
        unseen_images=_names(unseen),
        curve=curve,
        rows=[_row(seen_set, contender, tokens) for contender in tried],
        chosen=best.spec.name,
        unseen=[_row(unseen_set, contender, tokens) for contender in judged],
        against_shipped=against,
        against_random=_compared(unseen_set, chosen, chance),
        wrote=written.name,
        spec=_named(written, called, budget).to_dict(),
        notes=list(dict.fromkeys(notes)),
    )


def budget_share(budget: str) -> float:
    """A budget as a number.

    Raises:
        InputError: it is no share.
    """
    try:
        share = float(parse_share(budget))
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"budget: found {budget!r}; give a share of the visual tokens between 0% and 100%, as 11%.")
    return share


def checked_base(base: PipelineSpec) -> PipelineSpec:
    """The spec, if stages are all that it has.

    Raises:
        SpecError: it has no stage, a compressor or `resize`.
    """
    more = [name for name in ("compressor", "resize") if getattr(base, name) is not None]
    if not base.stages or more:
        found = f"found {' and '.join(more)}" if more else "found no stage"
        raise SpecError(
            f"base {base.name!r}: {found}; calibration places stages and nothing else. Give a spec that has stages "
            f"alone, such as {DEFAULT_SPEC}."
        )
    return base


def _allowed(adapter: Adapter, base: PipelineSpec) -> tuple[list[int], list[str]]:
    """Layers after which the base's first stage can stand, and why not after others."""
    allowed, reasons = [], []
    first = base.stages[0]
    for layer in range(len(adapter.layers)):
        stage = first.model_copy(update={"after_layer": layer, "keep": Keep(share="50%")})
        try:
            Pipeline(adapter.model, stages=[stage], positions=base.positions, adapter=adapter)
        except TrioError as error:
            refusal = error
            reasons.append(f"no stage after layer {layer}: {error}")
        else:
            allowed.append(layer)
    if not allowed:
        raise refusal
    return allowed, reasons


def _shipped(base: PipelineSpec, budget: str, layers: int, tokens: int) -> PipelineSpec:
    """What a calibrated schedule is held against: the shipped spec for the budget, or the base at the budget."""
    spec, share = base, parse_share(budget)
    if base == load_spec(DEFAULT_SPEC):
        near = f"{DEFAULT_SPEC.rpartition('-')[0]}-{int(100 * share)}"
        spec = load_spec(near) if near in shipped_specs() else base
    if spec.budget is not None and spec.budget.fraction == share:
        return spec
    name = f"{spec.name} at {budget.strip()}"
    if any(stage.keep.auto for stage in spec.stages):
        return spec.model_copy(update={"name": name, "budget": Budget(average=budget)})
    return placed(name, resolve(spec, layers), tokens).spec(spec, budget)


def _tried(
    absorbed: Sequence[float],
    base: PipelineSpec,
    shipped: PipelineSpec,
    budget: str,
    allowed: Sequence[int],
    adapter: Adapter,
    tokens: int,
    notes: list[str],
) -> list[Contender]:
    """The schedules that are compared, each other than the shipped one, which comes last."""
    layers = len(adapter.layers)
    last = Contender.of([shipped], adapter)
    known = {_counts(shipped, layers, tokens): shipped.name}
    found = []
    for placement in candidates(absorbed, budget_share(budget), allowed):
        try:
            contender = Contender.of([placement.spec(base, budget)], adapter)
            counts = _counts(contender.spec, layers, tokens)
        except TrioError as error:
            notes.append(f"the schedule {placement.name} was left out: {error}")
            continue
        if counts in known:
            notes.append(f"the schedule {placement.name} is that of {known[counts]}")
            continue
        known[counts] = placement.name
        found.append(contender)
    return [*found, last]


def _best(asked: CalibrationSet, tried: Sequence[Contender]) -> Contender:
    """The one whose KL has the lowest upper end: not the one that a few images happened to suit."""
    kls = [asked.mean(contender.kl) for contender in tried]
    return min(zip(kls, tried, strict=True), key=lambda pair: (pair[0].high, pair[0].mean))[1]


def _counts(spec: PipelineSpec, layers: int, tokens: int) -> tuple[int, ...]:
    """Tokens of an image in each layer."""
    return resolve(spec, layers).counts(tokens)


def _row(asked: CalibrationSet, contender: Contender, tokens: int) -> CalibrationRow:
    schedule = resolve(contender.spec, len(asked.adapter.layers))
    return CalibrationRow(
        name=contender.spec.name,
        layers=list(schedule.layers),
        kept=list(schedule.stage_counts(tokens)),
        kl=asked.mean(contender.kl),
        top1=asked.share(contender.top1),
        visual_tokens=contender.tokens.visual / len(contender.kl),
        average_kept=contender.tokens.kept / len(contender.kl),
        flops=contender.tokens.flops_share,
    )


def _compared(asked: CalibrationSet, chosen: Contender, other: Contender) -> UnseenComparison:
    kl = asked.mean(chosen.kl, other.kl)
    return UnseenComparison(
        other=other.spec.name, kl=kl, top1=asked.mean(chosen.top1, other.top1), verdict=verdict_of(kl)
    )


def verdict_of(difference: Estimate) -> Verdict:
    """What the interval of a difference of KLs says of the first: better where all of it is below zero."""
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "not told apart"


def _itself(name: str) -> UnseenComparison:
    nothing = Estimate(mean=0.0, low=0.0, high=0.0)
    return UnseenComparison(other=name, kl=nothing, top1=nothing, verdict="the same")


def _named(spec: PipelineSpec, model: str, budget: str) -> PipelineSpec:
    """The spec with a name and a description of its own."""
    short = Path(model).name.lower()
    text = f"Schedule {spec.name} for {budget.strip()} of the visual tokens, calibrated on {model} (trio calibrate)"
    return spec.model_copy(update={"name": f"calibrated-{short}", "description": text})


def _names(samples: Sequence[PromptSample]) -> list[str]:
    return list(dict.fromkeys(sample.name for sample in samples))
