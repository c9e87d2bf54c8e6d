"""What a benchmark found: pydantic records that serialise to JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...core.record import Document, Record
from .machine import Machine
from .numbers import Interval, Spread

__all__ = ["BenchReport", "BenchRow", "Kind", "SpeedTarget", "SpeedVerdict"]

Kind = Literal["full", "keep-all", "spec", "oracle", "resize", "pool", "short", "naive"]


class BenchRow(Record):
    """One way of running the model.

    Attributes:
        name: of the way.
        kind: what it is.
        spec: the spec that it belongs to; None for the model as it is and for `keep-all`.
        visual_tokens: of a sample, entering.
        average_kept: visual tokens averaged over the decoder layers.
        flops: counted by formula for the prefill of the batch, tower and overhead included; None where not known.
        overhead_flops: of these, what scoring, selecting and compressing take.
        prefill: seconds from the call of `generate` to the first token; None where it would mean nothing.
        decode: seconds of a decode step; None where none was run.
        speedup: seconds of the full model's prefill / of this one's, of the same rounds.
        over_oracle: seconds of this prefill / of the oracle's, of the same rounds.
        decode_over_short: seconds of this decode step / of that of the untouched model with as long a cache.
        over_full: seconds of this prefill / of the full model's.
        phases: seconds of a prefill by phase, measured in runs of their own.
        peak_bytes: growth of memory in a prefill.
        launches: operators of a prefill that an accelerator would launch (of a selector in blocks one round a stage);
            None where they were not counted.
        notes: what a reader should know.
    """

    name: str
    kind: Kind
    spec: str | None = None
    visual_tokens: float
    average_kept: float
    flops: int | None = None
    overhead_flops: int | None = None
    prefill: Spread | None = None
    decode: Spread | None = None
    speedup: Interval | None = None
    over_oracle: Interval | None = None
    decode_over_short: Interval | None = None
    over_full: Interval | None = None
    phases: dict[str, float] | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    notes: list[str] = Field(default_factory=list)


class SpeedTarget(Record):
    """A bound that a spec should keep.

    Attributes:
        name: what is bounded.
        spec: of which spec; None for `keep-all`.
        bound: the largest value, or with `at_least` the smallest.
        found: the value.
        at_least: whether larger is better.
        held: whether the bound is kept.
        note: where it is not, where the time goes.
    """

    name: str
    spec: str | None
    bound: float
    found: float
    at_least: bool = False
    held: bool
    note: str = ""


class SpeedVerdict(Record):
    """Whether a spec is faster than the full model here, and where it begins to be.

    Attributes:
        spec: its name.
        faster: whether the prefill is faster in this benchmark.
        smallest: where it is not, by what was varied (``image``, ``batch``, ``budget``) the first value that wins;
            None where none that was tried does. Empty where the spec is faster.
        tried: what was tried, by what was varied, with the speed-ups found.
    """

    spec: str
    faster: bool
    smallest: dict[str, str | None] = Field(default_factory=dict)
    tried: dict[str, list[tuple[str, float]]] = Field(default_factory=dict)

    def __str__(self) -> str:
        """One sentence."""
        if self.faster:
            return f"{self.spec}: faster than the full model here"
        found = [f"{what} {value}" for what, value in self.smallest.items() if value is not None]
        if not found:
            tried = "; ".join(f"{what} up to {values[-1][0]}" for what, values in self.tried.items() if values)
            return f"{self.spec}: not faster than the full model here, nor at {tried or 'anything else'}"
        return f"{self.spec}: not faster than the full model here; it is from {' or '.join(found)} on"


class BenchReport(Document):
    """A benchmark of one model on one machine.

    Attributes:
        model: architecture, or checkpoint.
        layers: decoder layers.
        weights: where they come from.
        dtype: of the weights.
        machine: where it ran.
        batch: samples.
        image: height and width in pixels.
        visual_tokens: of a sample.
        text_tokens: the other tokens of a sample.
        steps: decode steps behind each prefill.
        rows: the ways.
        verdicts: is a spec ever slower.
        targets: bounds of this project.
        command: that repeats it.
    """

    model: str
    layers: int
    weights: str
    dtype: str
    machine: Machine
    batch: int
    image: tuple[int, int]
    visual_tokens: int
    text_tokens: int
    steps: int
    rows: list[BenchRow]
    verdicts: list[SpeedVerdict] = Field(default_factory=list)
    targets: list[SpeedTarget] = Field(default_factory=list)
    command: str = ""

    def row(self, kind: Kind, spec: str | None = None) -> BenchRow | None:
        """The row of a kind, of a spec; None where it was not measured."""
        return next((row for row in self.rows if row.kind == kind and row.spec == spec), None)
