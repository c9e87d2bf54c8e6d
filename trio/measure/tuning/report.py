"""What a search found: pydantic records that serialise to JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...core.record import Document, Record
from ..fidelity.report import FidelityReport, FidelityRow
from ..statistics import Estimate
from .target import Bound, parse_target


class Candidate(Record):
    """A spec that was tried.

    Attributes:
        trial: its number, from 0.
        values: by metric (see `trio.measure.tuning.target`), on the images of the search.
        errors: standard errors of the qualities among them.
        kl: mean KL of the first token, nats, there.
        spec: as plain data.
    """

    trial: int
    values: dict[str, float]
    errors: dict[str, float]
    kl: float
    spec: dict[str, Any]


class TuningReport(Document):
    """A search and its verdict.

    Attributes:
        version: of this format: 1.
        model: name of the model.
        target: as written.
        quality: the metric that the search held against FLOPs.
        seed: of the split and the sampler.
        sampler: ``tpe`` or ``nsga2``.
        search_images: names of the images that the search saw.
        unseen_images: names of those that it did not.
        trials: how many specs were tried, those that could not run included.
        refused: for each reason how many specs could not run.
        left_out: parts that do not fit the model, with the reason.
        candidates: every spec that ran.
        front: trials of which no other is better in quality and FLOPs, by rising FLOPs.
        best: the trial that was chosen.
        spec: the chosen spec, with its name and description.
        search: fidelity of the chosen spec and of the default on the images of the search, each with its floor.
        unseen: the same on the other images. Only this one says what to expect.
        notes: what a reader should know.
    """

    version: Literal[1] = 1
    model: str
    target: str
    quality: str
    seed: int
    sampler: Literal["tpe", "nsga2"]
    search_images: list[str]
    unseen_images: list[str]
    trials: int
    refused: dict[str, int]
    left_out: dict[str, str]
    candidates: list[Candidate]
    front: list[int]
    best: int
    spec: dict[str, Any]
    search: FidelityReport
    unseen: FidelityReport
    notes: list[str] = Field(default_factory=list)

    def candidate(self, trial: int) -> Candidate:
        """The candidate of a trial."""
        return next(one for one in self.candidates if one.trial == trial)

    def verdict(self) -> list[str]:
        """A line for each condition: whether it holds on the images that the search has not seen."""
        row = self.unseen.results[0].spec
        lines = []
        for bound in parse_target(self.target.split(" and ")).bounds:
            quality = quality_of(row, bound.metric)
            value = cost_of(row, bound.metric)
            if quality is None:
                said, shown = "met" if bound.met(value) else "missed", bound.show(value)
            else:
                said, shown = _says(bound, quality), quality.percent()
            lines.append(f"{bound} on {self.unseen.images} images that the search has not seen: {said}, {shown}")
        return lines


def _says(bound: Bound, found: Estimate) -> str:
    if bound.met(found.low):
        return "met"
    if not bound.met(found.high):
        return "missed"
    if bound.met(found.mean):
        return "met by the mean, not by the whole interval"
    return "missed by the mean, but the interval reaches it"


def quality_of(row: FidelityRow, metric: str) -> Estimate | None:
    """A quality of `trio.measure.tuning.target` in a row; None for a cost."""
    agreement = row.agreement
    return {"agreement": agreement.top1, "answers": agreement.exact, "similarity": agreement.edit}.get(metric)


def cost_of(row: FidelityRow, metric: str) -> float:
    """A cost of `trio.measure.tuning.target` in a row; FLOPs that are not known are tokens, as in the search."""
    if metric == "speed":
        return row.speedup.first_token
    return row.flops if metric == "flops" and row.flops is not None else row.retention
