"""The specs that a search draws from, and how they are written as parameters of a trial."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ... import DEFAULT_SPEC
from ...adapters.base import Adapter
from ...encoders.compressors.base import COMPRESSORS
from ...errors import InputError, TrioError, did_you_mean
from ...pipeline import Pipeline
from ...scorers.base import SCORERS
from ...selectors.base import SELECTORS
from ...spec import PipelineSpec, load_spec
from ...spec.schedule import resolve

#: Stages at most. No published schedule has more.
STAGES = 3
#: Shares of the tokens in front of a stage (or the compressor) that it keeps.
LEAST, MOST = 0.05, 0.95
NO = "none"
#: Chance is what methods are compared with, and is no candidate.
FLOOR = "random"
#: Averages of the default spec with which a search begins.
STARTS = ("11.1%", "22.2%", "33.3%")
#: What `objective-gradient` supervises: the default, and the paper's; rows at most.
ROWS = ("after-picture", "prompt-end")
POSITIONS = 16


class Suggests(Protocol):
    """What gives parameters their values: an Optuna trial."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
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
    """

    layers: int
    compressors: tuple[str, ...]
    scorers: Mapping[str, int]
    selectors: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

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

        def fits(kind: str, name: str, spec: Mapping[str, Any]) -> bool:
            if name in without or (name == FLOOR and kind != "selector"):
                return False
            try:
                Pipeline.from_spec({"version": 1, **spec}, adapter.model, adapter=adapter)
            except TrioError as error:
                left_out[f"{kind} {name}"] = str(error)
                return False
            return True

        def stage(after: int, **parts: str) -> dict[str, Any]:
            return {"stages": [{"after_layer": after, "keep": "50%", **parts}]}

        scorers = [name for name in SCORERS.names() if fits("scorer", name, stage(middle, scorer=name))]
        chance = {"scorer": FLOOR}
        selectors = [n for n in SELECTORS.names() if fits("selector", n, stage(middle, selector=n, **chance))]
        compressors = [n for n in COMPRESSORS.names() if fits("compressor", n, {"compressor": _compressor(n, 0.5)})]
        if not (scorers and selectors) and not compressors:
            raise InputError("without: no part is left to search with; leave fewer out.")
        lowest = {name: int(bool(SCORERS.build(name).required() & {"ran", "last"})) for name in scorers}
        return cls(layers, tuple(compressors), lowest if selectors else {}, tuple(selectors), left_out)

    def draw(self, trial: Suggests) -> PipelineSpec:
        """The spec of a trial.

        Raises:
            SpecError: the values contradict each other.
        """
        made: dict[str, Any] = {"version": 1, "name": "trial"}
        chosen = NO
        if self.compressors:
            needed = not self.scorers
            choices = self.compressors if needed else (NO, *self.compressors)
            chosen = trial.suggest_categorical("compressor", choices)
        if chosen != NO:
            share = trial.suggest_float("compressor.keep", LEAST, MOST, log=True) if not _decides(chosen) else 1.0
            made["compressor"] = _compressor(chosen, share)
        if self.scorers:
            count = trial.suggest_int("stages", int(chosen == NO), STAGES)
            if count:
                made["stages"] = self._stages(trial, count)
        return load_spec(made)

    def _stages(self, trial: Suggests, count: int) -> list[dict[str, Any]]:
        scorer: dict[str, Any] = {"name": trial.suggest_categorical("scorer", tuple(self.scorers))}
        low = self.scorers[scorer["name"]]
        if scorer["name"] == "objective-gradient":
            scorer["rows"] = trial.suggest_categorical("rows", ROWS)
            scorer["positions"] = trial.suggest_int("positions", 1, POSITIONS)
        selector: dict[str, Any] = {"name": trial.suggest_categorical("selector", self.selectors)}
        if selector["name"] == "nms":
            selector["threshold"] = round(trial.suggest_float("threshold", 0.5, 1.0), 2)
        later = selector
        if selector["name"] == "soft-nms":
            selector["weight"] = round(trial.suggest_float("weight", 0.0, 1.0), 2)
            later = {**selector, "spread": 0.0}  # behind the first stage it gained nothing
            selector["spread"] = round(trial.suggest_float("spread", 0.0, 1.0), 2)
        depths = sorted({max(low, trial.suggest_int(f"layer.{i}", 0, self.layers - 1)) for i in range(count)})
        return [
            {
                "after_layer": depth,
                "keep": {"share": _percent(trial.suggest_float(f"keep.{i}", LEAST, MOST, log=True)), "of": "current"},
                "scorer": scorer,
                "selector": later if i else selector,
            }
            for i, depth in enumerate(depths)
        ]

    def starts(self, tokens: int) -> list[dict[str, Any]]:
        """Parameters of the default spec at some averages: where a search begins.

        Args:
            tokens: visual tokens of a picture.
        """
        default = load_spec(DEFAULT_SPEC)
        scorer, selector = (part.as_mapping() for part in (default.stages[0].scorer, default.stages[0].selector))
        if scorer["name"] not in self.scorers or selector["name"] not in self.selectors:
            return []
        parts = {"scorer": scorer.pop("name"), "selector": selector.pop("name"), **scorer, **selector}
        found = []
        for average in STARTS:
            schedule = resolve(load_spec({**default.to_dict(), "budget": {"average": average}}), self.layers)
            kept = schedule.stage_counts(tokens)
            if len(set(schedule.layers)) < len(kept) or len(kept) > STAGES:
                continue
            shares = [after / before for before, after in zip((tokens, *kept), kept, strict=False)]
            params: dict[str, Any] = {"compressor": NO} if self.compressors else {}
            params |= {"stages": len(kept), **parts}
            params |= {f"layer.{i}": layer for i, layer in enumerate(schedule.layers)}
            params |= {f"keep.{i}": min(max(share, LEAST), MOST) for i, share in enumerate(shares)}
            found.append(params)
        return found


def _decides(name: str) -> bool:
    return COMPRESSORS.get(name).decides_count


def _compressor(name: str, share: float) -> dict[str, Any]:
    return {"name": name} if _decides(name) else {"name": name, "keep": _percent(share)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
