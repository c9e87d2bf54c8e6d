"""The rows of an evaluation: the specs, and the controls that belong to each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...adapters import adapter_for
from ...errors import InputError, TrioError
from ...pipeline import Pipeline
from ...spec import CompressorSpec, Keep, PartSpec, PipelineSpec, StageSpec
from ...spec.schedule import resolve
from .floors import Oracle, UniformGridScorer

__all__ = ["SEEDS", "ControlSchedule", "EvaluationRow", "none_name", "plan"]

SEEDS = range(5)
Control = Literal[
    "full", "no image", "wrong image", "none", "uniform", "random", "oracle", "equal tokens", "equal cost", "size"
]
ImageChoice = Literal["own", "blank", "wrong", "small", "resized"]
#: Retention of the random row that the validity gate looks at, and how near to it a schedule's own must be.
GATE_SHARE, GATE_NEAR = 0.111, 0.015


@dataclass(frozen=True)
class ControlSchedule:
    """Where tokens go and how many stay; specs that differ in nothing else share their controls,
    as do those whose counts differ by no more than a token in a typical image.

    Attributes:
        label: for people: the layers, and the average share that stays.
        layers: decoder layers that run before each stage.
        spec: stages with the numbers alone; scorers and selectors are to be replaced.
        average: visual tokens averaged over the layers, for an image of `started` tokens.
        started: visual tokens of a typical image.
    """

    label: str
    layers: tuple[int, ...]
    spec: PipelineSpec = field(repr=False)
    average: float
    started: int

    @property
    def first(self) -> int:
        """Decoder layers that run before the first stage."""
        return self.layers[0]

    @property
    def share(self) -> float:
        """Average share that stays."""
        return self.average / self.started

    def with_parts(self, name: str, scorer: Any, selector: Any = "top-k") -> PipelineSpec:
        """The schedule with another way to choose."""
        parts = {"scorer": PartSpec.parse(scorer), "selector": PartSpec.parse(selector)}
        stages = [stage.model_copy(update=parts) for stage in self.spec.stages]
        return self.spec.model_copy(update={"name": name, "stages": stages})


@dataclass(frozen=True)
class EvaluationRow:
    """One way of answering all questions.

    Attributes:
        name: unique; five draws of random have a name each.
        group: name of the row in tables: the draws of random share it.
        control: which control it is; empty for a spec that was asked for.
        schedule: label of the schedule that it belongs to; empty for the full model with some image.
        spec: what runs; None for the model as it is.
        image: which image is shown.
        tokens: for a smaller image, the share of its tokens that it should have: ``small`` scales both sides alike,
            ``resized`` fits the grid as `resize` of a spec does.
        refused: why the row cannot be had here; empty where it can.
    """

    name: str
    group: str
    control: Control | Literal[""] = ""
    schedule: str = ""
    spec: PipelineSpec | None = None
    image: ImageChoice = "own"
    tokens: float = 0.0
    refused: str = ""


def plan(
    model: Any,
    specs: Sequence[PipelineSpec],
    started: int,
    *,
    several_images: bool,
    maps: bool,
    smallest: float,
    entered: dict[str, float] | None = None,
) -> tuple[list[EvaluationRow], dict[str, ControlSchedule]]:
    """All rows of an evaluation.

    Args:
        model: the model.
        specs: what is evaluated, each with a name of its own.
        started: visual tokens of a typical image.
        several_images: whether there is another image to show.
        maps: whether it is known where in the images things are.
        smallest: share of the tokens that is left of an image when it is made as small as can be.
        entered: by name, the tokens that a compressor without a stated count leaves of a typical image.

    Returns:
        The rows, and the schedules by label.

    Raises:
        TrioError: a spec does not fit the model.
    """
    layers = len(adapter_for(model).layers)
    rows = [
        EvaluationRow("full", "full", "full"),
        EvaluationRow("no image", "no image", "no image", image="blank"),
    ]
    wrong = EvaluationRow("wrong image", "wrong image", "wrong image", image="wrong")
    if not several_images:
        wrong = replace(wrong, refused="there is only one image")
    rows.append(wrong)
    schedules: dict[str, ControlSchedule] = {}
    for spec in specs:
        try:
            Pipeline.from_spec(spec, model)  # a spec that does not fit is refused before anything runs
        except TrioError as error:
            raise type(error)(f"spec {spec.name!r}: {error}") from error
        schedule = _schedule(spec, layers, started, (entered or {}).get(spec.name), schedules.values())
        schedules[schedule.label] = schedule
        rows.append(EvaluationRow(spec.name, spec.name, "", schedule.label, spec))
    for schedule in {one.first: one for one in schedules.values()}.values():
        rows.append(_nothing(schedule))
    for schedule in schedules.values():
        rows += _controls(model, schedule, maps, smallest)
    if not any(abs(schedule.share - GATE_SHARE) <= GATE_NEAR for schedule in schedules.values()):
        gate = _gate(next(iter(schedules.values())), layers)
        schedules[gate.label] = gate
        for seed in SEEDS:
            floor = gate.with_parts("random", {"name": "random", "seed": seed})
            rows.append(
                EvaluationRow(f"random {seed}, {gate.label}", f"random, {gate.label}", "random", gate.label, floor)
            )
    return rows, schedules


def _schedule(
    spec: PipelineSpec, layers: int, started: int, entered: float | None, known: Iterable[ControlSchedule]
) -> ControlSchedule:
    stages = [stage.model_copy(update=_RANDOM) for stage in spec.stages]
    budget, resize = spec.budget, spec.resize
    given = spec.resized(started)
    if (
        spec.compressor is None and not stages
    ):  # resized and nothing else: as many tokens, dropped before the first layer
        stages, resize, given = [StageSpec(after_layer=0, keep=_share(given, started), **_RANDOM)], None, started
    if spec.compressor is not None:  # the same count, dropped before the first layer
        keep = spec.compressor.keep
        if keep is None:
            if entered is None:
                raise InputError(f"spec {spec.name!r}: its compressor decides its own count, which was not measured.")
            keep, budget = Keep.parse(_share(entered, given)), None
        first = StageSpec(after_layer=0, keep=keep, if_fewer=spec.compressor.if_fewer, **_RANDOM)
        if stages and resolve(spec, layers).layers[0] == 0:  # two reductions in one place: what the second one leaves
            compressed = None if entered is None else round(entered)
            count = resolve(spec, layers).stage_counts(given, compressed=compressed)[0]
            first = first.model_copy(update={"keep": Keep.parse(_share(count, given) if count else 0)})
            stages, budget = stages[1:], None
        stages = [first, *stages]
    plain = PipelineSpec(
        name="schedule",
        resize=resize,
        stages=stages,
        positions=spec.positions,
        newlines=spec.newlines,
        budget=budget,
    )
    resolved = resolve(plain, layers)
    for one in known:
        if _alike(one.spec, plain, layers, started):
            return one
    average = resolved.average(given)
    resized = "" if resize is None else f"resized to {resize}, "
    label = f"{resized}after {', '.join(map(str, resolved.layers))}: {100 * average / started:.1f}%"
    taken = sum(one.label.partition(" #")[0] == label for one in known)
    return ControlSchedule(f"{label} #{taken + 1}" if taken else label, tuple(resolved.layers), plain, average, started)


_RANDOM = {"scorer": PartSpec(name="random"), "selector": PartSpec(name="top-k")}


def _share(count: float, started: int) -> str:
    return f"{100 * count / started:.4f}%"


def _alike(one: PipelineSpec, other: PipelineSpec, layers: int, started: int) -> bool:
    """Whether two schedules drop at the same layers and leave as many, a token more or less in a typical image."""
    rules = [
        (spec.resize, spec.positions, spec.newlines, [(s.keep.per, s.if_fewer) for s in spec.stages])
        for spec in (one, other)
    ]
    if rules[0] != rules[1]:
        return False
    both = [resolve(spec, layers) for spec in (one, other)]
    if both[0].layers != both[1].layers:
        return False
    for times in (1, 2):  # a count and a share that agree on one size do not on the other
        counts = [resolved.stage_counts(times * started) for resolved in both]
        if any(abs(a - b) > times for a, b in zip(*counts, strict=True)):
            return False
    return True


def _gate(like: ControlSchedule, layers: int) -> ControlSchedule:
    """One stage at the place of the first one that leaves 11.1% there."""
    stage = StageSpec(after_layer=like.first, keep=Keep.parse("11.1%"), **_RANDOM)
    spec = like.spec.model_copy(update={"stages": [stage], "budget": None, "resize": None})
    average = resolve(spec, layers).average(like.started)
    return ControlSchedule(f"after {like.first}: 11.1% there", (like.first,), spec, average, like.started)


def none_name(first: int) -> str:
    """Name of the row in which all visual tokens are dropped after so many layers."""
    return f"none after layer {first}"


def _nothing(schedule: ControlSchedule) -> EvaluationRow:
    stage = StageSpec(after_layer=schedule.first, keep=Keep.parse(0), **_RANDOM)
    spec = schedule.spec.model_copy(update={"name": "none", "stages": [stage], "budget": None, "resize": None})
    name = none_name(schedule.first)
    return EvaluationRow(name, name, "none", "", spec)


def _controls(model: Any, schedule: ControlSchedule, maps: bool, smallest: float) -> list[EvaluationRow]:
    label = schedule.label

    def row(control: Control, name: str, spec: PipelineSpec | None = None, **more: Any) -> EvaluationRow:
        group = name if control == "equal tokens" else f"{control}, {label}"
        return EvaluationRow(name, group, control, label, spec, **more)

    rows = [_equal_tokens(model, schedule, smallest, row)]
    rows.append(row("uniform", f"uniform, {label}", schedule.with_parts("uniform", UniformGridScorer())))
    for seed in SEEDS:
        spec = schedule.with_parts("random", {"name": "random", "seed": seed})
        rows.append(row("random", f"random {seed}, {label}", spec))
    oracle = schedule.with_parts("oracle", Oracle())
    reason = "" if maps else "the task does not say where in the images things are"
    rows.append(row("oracle", f"oracle, {label}", oracle, refused=reason))
    return rows


def _equal_tokens(model: Any, schedule: ControlSchedule, smallest: float, row: Any) -> EvaluationRow:
    """A smaller image with as many tokens in every layer; where the model cannot have one, pooled features."""
    result: EvaluationRow
    if smallest <= schedule.share:
        name = f"resize, equal tokens, {schedule.label}"
        result = row("equal tokens", name, image="small", tokens=schedule.share)
        return result
    name = f"average-pool, equal tokens, {schedule.label}"
    pooled = CompressorSpec.parse({"name": "average-pool", "keep": _share(schedule.average, schedule.started)})
    try:
        spec = PipelineSpec(name="average-pool", compressor=pooled, positions=schedule.spec.positions)
        Pipeline.from_spec(spec, model)
    except TrioError as error:
        reason = f"no image gives this model so few tokens, and its features cannot be pooled: {error}"
        result = row("equal tokens", name, refused=reason)
        return result
    result = row("equal tokens", name, spec)
    return result
