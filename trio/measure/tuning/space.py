"""The specs that a search draws from, and how they are written as parameters of a trial."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ... import DEFAULT_SPEC
from ...adapters.base import Adapter
from ...core.part import Categorical, Choice, IntRange, Part
from ...encoders.compressors.base import COMPRESSORS
from ...errors import InputError, TrioError, did_you_mean
from ...pipeline import Pipeline
from ...registry import registry_of
from ...scorers.base import SCORERS
from ...selectors.base import SELECTORS
from ...spec import PipelineSpec, load_spec
from ...spec.schedule import resolve

#: Stages at most. No published schedule has more.
STAGES = 3
#: Shares of the tokens in front of a stage (or the compressor) that it keeps.
LEAST, MOST = 0.05, 0.95
NO = "none"
#: Shares of an image's visual tokens that are tried in front of the processor; the first one leaves it as it is.
RESIZES = ("100%", "85%", "70%", "60%", "50%", "40%")
#: What scorers need that is not there before a layer has run.
AFTER_A_LAYER = frozenset({"ran", "last"})
#: Averages of the default spec with which a search begins.
STARTS = ("11.1%", "22.2%", "33.3%")


class Suggests(Protocol):
    """What gives parameters their values: an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from `low` to `high`."""


@dataclass(frozen=True)
class Space:
    """Parts that fit a model, and its depth.

    Attributes:
        layers: decoder layers of the model.
        compressors: names; empty where none fits.
        scorers: names, with the lowest layer after which each can stand.
        selectors: names.
        left_out: parts that do not fit, with the reason.
        resizes: sizes of images, as shares of their tokens; empty where an image's tokens do not follow its size.
    """

    layers: int
    compressors: tuple[str, ...]
    scorers: Mapping[str, int]
    selectors: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    resizes: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapter: Adapter, *, without: Collection[str] = ()) -> Space:
        """All registered parts that a pipeline on the model can be built with.

        Args:
            adapter: of the model.
            without: names of parts to leave out.

        Raises:
            InputError: `without` has a name that no registry knows, or leaves nothing to search.
        """
        known = {*COMPRESSORS.names(), *SCORERS.names(), *SELECTORS.names()}
        for name in without:
            if name not in known:
                raise InputError(f"without: there is no part {name!r}. {did_you_mean(name, known)}".rstrip())
        layers, left_out = len(adapter.layers), {}
        middle = max(1, layers // 2)

        def fits(kind: str, name: str, spec: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> bool:
            if name in without:
                return False
            try:
                part = _example(kind, name)
                if part is None:
                    return False
                Pipeline.from_spec({"version": 1, **spec(part)}, adapter.model, adapter=adapter)
            except TrioError as error:
                left_out[f"{kind} {name}"] = str(error)
                return False
            return True

        def stage(scorer: Any, **parts: Any) -> dict[str, Any]:
            return {"stages": [{"after_layer": middle, "keep": "50%", "scorer": scorer, **parts}]}

        scorers = [name for name in SCORERS.names() if fits("scorer", name, stage)]
        any_scorer = _example("scorer", scorers[0]) if scorers else None
        selectors = [
            name
            for name in SELECTORS.names()
            if scorers and fits("selector", name, lambda part: stage(any_scorer, selector=part))
        ]
        compressors = [
            name
            for name in COMPRESSORS.names()
            if fits("compressor", name, lambda part: {"compressor": _compressor(part, 0.5)})
        ]
        if not (scorers and selectors) and not compressors:
            raise InputError("without: no part is left to search with; leave fewer out.")
        needs = {name: SCORERS.build(_example("scorer", name)).required() for name in scorers}
        lowest = {name: int(bool(needed & AFTER_A_LAYER)) for name, needed in needs.items()}
        resizes = RESIZES if adapter.image_tokens == "by-size" else ()
        return cls(layers, tuple(compressors), lowest if selectors else {}, tuple(selectors), left_out, resizes)

    def draw(self, trial: Suggests) -> PipelineSpec:
        """The spec of a trial.

        Raises:
            SpecError: the values contradict each other.
        """
        made: dict[str, Any] = {"version": 1, "name": "trial"}
        chosen = NO
        resize = trial.suggest_categorical("resize", self.resizes) if self.resizes else RESIZES[0]
        smaller = resize != RESIZES[0]
        if smaller:
            made["resize"] = resize
        if self.compressors:
            needed = not self.scorers and not smaller
            choices = self.compressors if needed else (NO, *self.compressors)
            # A parameter has the same choices in all trials: Optuna refuses others.
            name = "compressor of the whole image" if needed and self.resizes else "compressor"
            chosen = trial.suggest_categorical(name, choices)
        if chosen != NO:
            share = trial.suggest_float("compressor.keep", LEAST, MOST, log=True) if not _decides(chosen) else 1.0
            made["compressor"] = _compressor(_drawn(trial, "compressor", chosen)[0], share)
        if self.scorers:
            count = trial.suggest_int("stages", int(chosen == NO and not smaller), STAGES)
            if count:
                made["stages"] = self._stages(trial, count)
        return load_spec(made)

    def _stages(self, trial: Suggests, count: int) -> list[dict[str, Any]]:
        name = trial.suggest_categorical("scorer", tuple(self.scorers))
        low = self.scorers[name]
        scorers = _drawn(trial, "scorer", name)
        selectors = _drawn(trial, "selector", trial.suggest_categorical("selector", self.selectors))
        depths = sorted({max(low, trial.suggest_int(f"layer.{i}", 0, self.layers - 1)) for i in range(count)})
        return [
            {
                "after_layer": depth,
                "keep": {"share": _percent(trial.suggest_float(f"keep.{i}", LEAST, MOST, log=True)), "of": "current"},
                "scorer": scorers[min(i, 1)],
                "selector": selectors[min(i, 1)],
            }
            for i, depth in enumerate(depths)
        ]

    def starts(self, tokens: int) -> list[dict[str, Any]]:
        """Parameters of the default spec at some averages: where a search begins.

        Args:
            tokens: visual tokens of an image.
        """
        default = load_spec(DEFAULT_SPEC)
        stage, parts = default.stages[0], {}
        for kind, part, known in (("scorer", stage.scorer, self.scorers), ("selector", stage.selector, self.selectors)):
            built = registry_of(kind).build(part)
            name = registry_of(kind).name_of(type(built))
            if name is None or name not in known:
                return []
            parts[kind] = name
            for parameter in built.search_space() or {}:
                parts[_key(kind, name, parameter)] = getattr(built, parameter)
        starts = []
        for average in STARTS:
            schedule = resolve(load_spec({**default.to_dict(), "budget": {"average": average}}), self.layers)
            kept = schedule.stage_counts(tokens)
            if len(set(schedule.layers)) < len(kept) or len(kept) > STAGES:
                continue
            shares = [after / before for before, after in zip((tokens, *kept), kept, strict=False)]
            params: dict[str, Any] = {"compressor": NO} if self.compressors else {}
            params |= {"resize": RESIZES[0]} if self.resizes else {}
            params |= {"stages": len(kept), **parts}
            params |= {f"layer.{i}": layer for i, layer in enumerate(schedule.layers)}
            params |= {f"keep.{i}": min(max(share, LEAST), MOST) for i, share in enumerate(shares)}
            starts.append(params)
        return starts


def _key(kind: str, name: str, parameter: str) -> str:
    """What a trial calls a parameter of a part: parts may have parameters of the same name."""
    return f"{kind}.{name}.{parameter}"


def _drawn(trial: Suggests, kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A part with the parameters of a trial: in the first stage (or the compressor), and in later ones."""
    space: Mapping[str, Choice] = registry_of(kind).get(name).search_space() or {}
    first = {parameter: _suggested(trial, _key(kind, name, parameter), choice) for parameter, choice in space.items()}
    later = {parameter: choice.later for parameter, choice in space.items() if choice.later is not None}
    return {"name": name, **first}, {"name": name, **first, **later}


def _suggested(trial: Suggests, key: str, choice: Choice) -> Any:
    if isinstance(choice, Categorical):
        return trial.suggest_categorical(key, choice.options)
    if isinstance(choice, IntRange):
        return trial.suggest_int(key, choice.low, choice.high)
    return round(trial.suggest_float(key, choice.low, choice.high), choice.digits)


def _example(kind: str, name: str) -> dict[str, Any] | None:
    """A part with the first values of its search space; None for one that is no candidate."""
    cls: type[Part] = registry_of(kind).get(name)
    space = cls.search_space()
    if space is None:
        return None
    first = {key: one.options[0] if isinstance(one, Categorical) else one.low for key, one in space.items()}
    return {"name": name, **first}


def _decides(name: str) -> bool:
    return COMPRESSORS.get(name).decides_count


def _compressor(part: Mapping[str, Any], share: float) -> dict[str, Any]:
    return dict(part) if _decides(part["name"]) else {**part, "keep": _percent(share)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
