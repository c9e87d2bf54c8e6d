"""One run of a model by the clock, rounds in which all ways take turns, and where the time of a prefill goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from ...adapters.base import Adapter
from ...pipeline import Pipeline
from .machine import wait

__all__ = ["Round", "TimedWay", "phases", "rounds", "run"]


@dataclass(frozen=True)
class TimedWay:
    """Something that is measured.

    Attributes:
        name: in tables.
        inputs: what `generate` takes, on the model's device.
        attached: a context in which the model runs this way.
        steps: decode steps behind the prefill.
    """

    name: str
    inputs: Mapping[str, Any]
    attached: Callable[[], AbstractContextManager[Any]]
    steps: int


@dataclass(frozen=True)
class Round:
    """One run: seconds to the first token, and of each decode step."""

    prefill: float
    steps: list[float] = field(default_factory=list)

    @property
    def step(self) -> float | None:
        """Median of the decode steps; None without one."""
        return median(self.steps) if self.steps else None


class _Clock:
    """What `generate` hands its tokens to; the time of each is noted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        wait(self._device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def run(model: Any, inputs: Mapping[str, Any], steps: int) -> Round:
    """A greedy `generate` of `steps` + 1 tokens.

    Args:
        model: as the way has it, pipelines attached.
        inputs: of `generate`.
        steps: decode steps behind the prefill.
    """
    clock = _Clock(model.device)
    wait(model.device)
    begin = time.perf_counter()
    model.generate(
        **inputs, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False, num_beams=1, streamer=clock
    )
    first, *later = clock.times[1:]  # the prompt is handed over first
    edges = [first, *later]
    return Round(first - begin, [after - before for before, after in pairwise(edges)])


def rounds(
    model: Any,
    ways: Sequence[TimedWay],
    *,
    least: int,
    most: int,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Round]]:
    """Runs all ways in turns, so that what else the machine does falls on all of them.

    Each round begins with another way. The first round pays for loading and caches and is not kept.

    Args:
        model: the model.
        ways: what to run.
        least: rounds that are run whatever they take.
        most: rounds at most.
        seconds: after which no further round starts.
        progress: told how many rounds are done, and of how many.
    """
    found: dict[str, list[Round]] = {way.name: [] for way in ways}
    begin = time.perf_counter()
    for number in range(most + 1):
        if number > least and time.perf_counter() - begin > seconds:
            break
        turn = number % len(ways)
        for way in [*ways[turn:], *ways[:turn]]:
            with way.attached():
                taken = run(model, way.inputs, way.steps)
            if number:
                found[way.name].append(taken)
        progress(number, most)
    return found


def phases(adapter: Adapter, pipeline: Pipeline | None, way: TimedWay, *, repeats: int = 3) -> dict[str, float]:
    """Seconds of a prefill by phase, medians; each phase is waited for, so that they add up to more than a free run.

    Args:
        adapter: of the model.
        pipeline: that the way attaches, with the report level ``full``; None where it has none.
        way: what to run.
        repeats: how often.

    Returns:
        ``tower`` (and projector), ``compression``, ``scoring``, ``selection``, ``layers`` and ``other``: embeddings,
        masks, bookkeeping, output head and what `generate` does around them.
    """
    found: list[dict[str, float]] = []
    model: Any = adapter.model
    for _ in range(repeats):
        with way.attached(), _Stopwatch(adapter).running() as stopwatch:
            total = run(model, way.inputs, 0).prefill
        known = dict(stopwatch.seconds)
        if pipeline is not None:
            timing = pipeline.report.timing or {}
            known.update({name: timing[name] for name in ("compression", "scoring", "selection") if name in timing})
        found.append({**known, "other": max(0.0, total - sum(known.values()))})
    return {name: median([one.get(name, 0.0) for one in found]) for name in found[0]}


class _Stopwatch:
    """Times modules by hooks that stand innermost: behind those of a pipeline that is attached already."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._begun: dict[str, list[float]] = {"tower": [], "layers": []}
        self.seconds: dict[str, float] = {"tower": 0.0, "layers": 0.0}

    @contextmanager
    def running(self) -> Iterator[_Stopwatch]:
        handles = []
        modules: list[tuple[str, nn.Module]] = [("layers", layer) for layer in self._adapter.layers]
        modules += [("tower", module) for module in (self._adapter.vision_tower, self._adapter.projector)]
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(self._begin(name)))
            handles.append(module.register_forward_hook(self._end(name), prepend=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> float:
        model: Any = self._adapter.model
        wait(model.device)
        return time.perf_counter()

    def _begin(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._begun[name].append(self._now())

        return hook

    def _end(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            begun = self._begun[name].pop()
            if not self._begun[name]:  # a projector within its tower counts once
                self.seconds[name] += self._now() - begun

        return hook
