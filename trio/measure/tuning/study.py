"""The search itself: Optuna, seeded so that a search that was stopped goes on as if it had not been."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ... import DISTRIBUTION
from ...errors import InputError, TrioError
from ...spec import PipelineSpec
from .report import Candidate
from .space import Space
from .trials import Found

Sampler = Literal["tpe", "nsga2"]


def optuna() -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna as module
    except ImportError as error:
        raise InputError(
            f"tune: Optuna is missing, which does the searching; install it with `pip install {DISTRIBUTION}[tune]`."
        ) from error
    module.logging.set_verbosity(module.logging.WARNING)
    return module


@dataclass(frozen=True)
class Tried:
    """All trials: the specs that ran, and for each reason how many did not."""

    candidates: list[Candidate]
    refused: dict[str, int]

    @property
    def count(self) -> int:
        """Number of trials."""
        return len(self.candidates) + sum(self.refused.values())


class Study:
    """A search whose trials are kept in a file, or in memory."""

    def __init__(self, file: Path | None, setup: Mapping[str, Any], *, seed: int, sampler: Sampler) -> None:
        """Opens or begins a search.

        Args:
            file: where trials are kept; None: nowhere.
            setup: what makes a search the same one: a file of another search is refused.
            seed: of the sampler.
            sampler: ``tpe`` or ``nsga2``.

        Raises:
            InputError: Optuna is missing, or the file cannot be used or belongs to another search.
        """
        self._optuna = optuna()
        self._seed, self._sampler = seed, sampler
        try:
            self._study = self._optuna.create_study(
                storage=None if file is None else self._storage(file),
                study_name="trio",
                directions=["maximize", "minimize"],
                load_if_exists=True,
                sampler=self._optuna.samplers.RandomSampler(seed=seed),
            )
        except (ValueError, KeyError, TypeError, OSError) as error:  # what a file of another kind makes it raise
            raise InputError(
                f"study {str(file)!r}: cannot be read as a search's trials ({error}); give another file."
            ) from error
        print_ = hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()
        before = self._study.user_attrs.get("setup")
        if before is None:
            self._study.set_user_attr("setup", print_)
        elif before != print_:
            raise InputError(
                f"study {str(file)!r}: it belongs to another search (model, images, prompts, seed, sampler, parts "
                "or what the target calls quality are others); give another file, or delete this one to begin anew."
            )
        for trial in self._study.get_trials(deepcopy=False):  # what was running when an earlier run was stopped
            if not trial.state.is_finished():
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _storage(self, file: Path) -> Any:
        journal = self._optuna.storages.journal
        return self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))

    def run(
        self,
        trials: int,
        space: Space,
        starts: list[dict[str, Any]],
        judge: Callable[[PipelineSpec], Found],
        quality: str,
        progress: Callable[[int, int], None] | None,
    ) -> Tried:
        """Tries specs until there are `trials` of them, those of earlier runs included.

        Args:
            trials: number of specs.
            space: where specs come from.
            starts: parameters of the first trials.
            judge: what a spec does.
            quality: metric held against FLOPs.
            progress: told (trials done, trials in all).
        """
        states = self._optuna.trial.TrialState
        while True:
            done = len(self._finished())
            if progress is not None:
                progress(min(done, trials), trials)
            if done >= trials:
                return self._tried(quality)
            self._study.sampler = self._sampler_of(done, starts)
            trial = self._study.ask()
            try:
                spec = space.draw(trial)
                trial.set_user_attr("spec", spec.to_dict())
                judged = judge(spec)
            except TrioError as error:
                trial.set_user_attr("refused", f"{type(error).__name__}: {str(error).partition(':')[0]}")
                self._study.tell(trial, state=states.PRUNED)
                continue
            trial.set_user_attr("values", dict(judged.values))
            trial.set_user_attr("errors", dict(judged.errors))
            trial.set_user_attr("kl", judged.kl)
            self._study.tell(trial, [judged.values[quality], judged.values["flops"]])

    def _sampler_of(self, done: int, starts: list[dict[str, Any]]) -> Any:
        """A fresh sampler for each trial, so that what it draws depends on the trials before it and on nothing else."""
        import warnings

        made = {"tpe": self._tpe, "nsga2": self._nsga2}[self._sampler](1_000_003 * self._seed + done)
        if done >= len(starts):
            return made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that fixing parameters is experimental
            return self._optuna.samplers.PartialFixedSampler(starts[done], made)

    def _tpe(self, seed: int) -> Any:
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=10)

    def _nsga2(self, seed: int) -> Any:
        return self._optuna.samplers.NSGAIISampler(seed=seed, population_size=12)

    def _finished(self) -> list[Any]:
        states = self._optuna.trial.TrialState
        return list(self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))

    def _tried(self, quality: str) -> Tried:
        candidates, refused = [], dict[str, int]()
        for number, trial in enumerate(self._finished()):
            facts = trial.user_attrs
            if "refused" in facts:
                refused[facts["refused"]] = refused.get(facts["refused"], 0) + 1
            else:
                fields = {key: facts[key] for key in ("values", "errors", "kl", "spec")}
                candidates.append(Candidate(trial=number, **fields))
        return Tried(candidates, refused)


def front(candidates: list[Candidate], quality: str) -> list[Candidate]:
    """Those of which no other is at least as good in quality and FLOPs and better in one, by rising FLOPs.

    Of several with the same two values the one with the lowest KL stands.
    """
    found: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.values["flops"], -c.values[quality], c.kl, c.trial)):
        if not found or one.values[quality] > found[-1].values[quality]:
            found.append(one)
    return found
