"""The benchmark: all ways of running a model, in turns, with phases, memory and counted FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...adapters.find import adapter_for
from ...cost import shape_of
from ...errors import TrioError
from ...spec import PipelineSpec
from .launched import Twin
from .machine import Machine, describe, peak_bytes
from .numbers import Interval, interval, spread
from .prompts import Prompts
from .report import BenchReport, BenchRow
from .targets import judge
from .timing import Round, phases, rounds, run
from .verdicts import verdict
from .ways import Entry, Maker

__all__ = ["BenchSettings", "measure"]


@dataclass(frozen=True)
class BenchSettings:
    """How much is measured.

    Attributes:
        batch: samples.
        steps: decode steps behind each prefill.
        rounds: rounds that are kept, at most.
        seconds: after which no further round starts.
        controls: also the pipeline that keeps all, the cheap alternatives and the short cache, and the targets judged.
        details: phases, memory and launches of each way, in runs of their own.
        search: where a spec loses, look for the smallest image, batch and budget where it wins.
    """

    batch: int = 1
    steps: int = 4
    rounds: int = 9
    seconds: float = 300.0
    controls: bool = True
    details: bool = True
    search: bool = True


#: Further ways, made when the batch is known; rows of a kind and a spec of their own.
More = Callable[[Maker], Sequence[Entry]]
_LEAST = 2


def measure(
    model: Any,
    prompts: Prompts,
    specs: Sequence[PipelineSpec],
    *,
    settings: BenchSettings | None = None,
    name: str = "",
    weights: str = "as loaded",
    more: More | None = None,
    command: str = "",
    machine: Machine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchReport:
    """Times the full model, each spec and what stands beside it.

    Args:
        model: in evaluation mode.
        prompts: makes the batches.
        specs: what is compared.
        settings: how much is measured.
        name: of the model, for the report.
        weights: where they come from, for the report.
        more: makes further ways.
        command: that repeats the benchmark, for the report.
        machine: where it runs; None: looked at, which takes a second or two.
        progress: told how many rounds are done, and of how many.

    Raises:
        TrioError: a spec does not fit the model.
    """
    chosen = settings or BenchSettings()
    adapter = adapter_for(model)
    try:
        shape = shape_of(model.config, dtype_bytes=model.dtype.itemsize)
    except TrioError:
        shape = None
    maker = Maker(adapter, prompts, samples=chosen.batch, steps=chosen.steps, shape=shape)
    entries = [maker.full(), *([maker.keep_all()] if chosen.controls else [])]
    for spec in specs:
        made = maker.of_spec(spec)
        entries += made if chosen.controls else [one for one in made if one.kind in ("spec", "oracle")]
    entries += list(more(maker)) if more is not None else []
    where = machine or describe(model.device, model.dtype)
    found = rounds(
        model,
        [entry.way for entry in entries],
        least=min(_LEAST, chosen.rounds),
        most=chosen.rounds,
        seconds=chosen.seconds,
        progress=progress,
    )
    twin = Twin(model) if chosen.details else None
    rows = [_row(entry, entries, found, chosen, maker, twin) for entry in entries]
    verdicts = [verdict(spec, rows, maker, search=chosen.search) for spec in specs]
    return BenchReport(
        model=name or type(model).__name__,
        layers=len(adapter.layers),
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        machine=where,
        batch=chosen.batch,
        image=prompts.sizes[0],
        visual_tokens=maker.visual,
        text_tokens=maker.text,
        steps=chosen.steps,
        rows=rows,
        verdicts=verdicts,
        targets=judge(rows, batch=chosen.batch, accelerator=model.device.type != "cpu") if chosen.controls else [],
        command=command,
    )


def _row(
    entry: Entry,
    entries: Sequence[Entry],
    found: dict[str, list[Round]],
    settings: BenchSettings,
    maker: Maker,
    twin: Twin | None,
) -> BenchRow:
    mine, full = found[entry.way.name], found[entries[0].way.name]
    oracle = _beside(entry, entries, found, "oracle")
    short = _beside(entry, entries, found, "short")
    timed = entry.kind != "short"  # its prefill is of text alone
    steps = [one.step for one in mine if one.step is not None]
    details = settings.details and timed
    adapter, model = maker.adapter, maker.adapter.model

    def prefill() -> None:
        with entry.way.attached():
            run(model, entry.way.inputs, 0)

    way = entry.way
    if entry.pipeline is not None:
        pipeline = entry.pipeline
        way = type(way)(way.name, way.inputs, lambda: pipeline, way.steps)
    launches = None
    if twin is not None and entry.kind in ("full", "spec", "resize"):
        launches = twin.launches(way.inputs, None if entry.pipeline is None else entry.pipeline.spec)
    device: Any = getattr(model, "device")  # noqa: B009  # transformers' models are not typed here
    return BenchRow(
        name=entry.way.name,
        kind=entry.kind,
        spec=entry.spec,
        visual_tokens=entry.visual,
        average_kept=entry.kept,
        flops=entry.flops,
        overhead_flops=entry.overhead,
        prefill=spread([one.prefill for one in mine]) if timed else None,
        decode=spread(steps) if steps else None,
        speedup=_ratio(full, mine) if timed and entry.kind != "full" else None,
        over_oracle=_ratio(mine, oracle) if oracle is not None and entry.kind in ("spec", "naive") else None,
        decode_over_short=_steps(mine, short) if short is not None and entry.kind == "spec" else None,
        over_full=_ratio(mine, full) if timed and entry.kind != "full" else None,
        phases=phases(adapter, entry.pipeline, way) if details else None,
        peak_bytes=peak_bytes(prefill, device) if details else None,
        launches=launches,
        notes=list(entry.notes),
    )


def _beside(entry: Entry, entries: Sequence[Entry], found: dict[str, list[Round]], kind: str) -> list[Round] | None:
    """The rounds of the same spec's way of that kind."""
    names = [one.way.name for one in entries if one.kind == kind and one.spec == entry.spec is not None]
    return found[names[0]] if names else None


def _ratio(above: Sequence[Round], below: Sequence[Round]) -> Interval:
    return interval([one.prefill / other.prefill for one, other in zip(above, below, strict=True)])


def _steps(above: Sequence[Round], below: Sequence[Round]) -> Interval | None:
    pairs = [(one.step, other.step) for one, other in zip(above, below, strict=True)]
    ratios = [one / other for one, other in pairs if one is not None and other]
    return interval(ratios) if ratios else None
