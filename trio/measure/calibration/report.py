"""What a calibration found: pydantic records that serialise to JSON, and the spec file with its verdict."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...core.printable import visible
from ...core.record import Document, Record
from ...spec import PipelineSpec, load_spec
from ..statistics import Estimate

__all__ = ["CalibrationReport", "CalibrationRow", "CurvePoint", "DropAllCurve", "UnseenComparison", "Verdict"]

Verdict = Literal["better", "not told apart", "worse", "the same"]
_BEFORE: dict[Verdict, str] = {"better": "than", "worse": "than", "not told apart": "from", "the same": "as"}


class CurvePoint(Record):
    """What the model still says of an image that was dropped whole at one depth.

    Attributes:
        depth: decoder layers already run; 0: nothing of the image is seen; all of them: nothing is dropped.
        kl: mean KL(full || dropped), nats, over the positions of the full model's answer.
        top1: share of these positions whose most probable token is the full model's.
        absorbed: share of what is taken in at all that is taken in up to here: the KL, made to fall, from 0 to 1.
    """

    depth: int
    kl: Estimate
    top1: Estimate
    absorbed: float


class DropAllCurve(Document):
    """The drop-all curve of a model: when it takes an image in.

    Attributes:
        version: of this format: 1.
        model: name or class of the model.
        images: how many; the samples of one image are drawn together by the intervals.
        samples: prompts.
        positions: tokens of the full model's answers, in all.
        visual_tokens: of a sample, on average.
        points: one for each depth, from 0 to all layers.
        notes: what a reader should know.
    """

    version: Literal[1] = 1
    model: str
    images: int
    samples: int
    positions: int
    visual_tokens: float
    points: list[CurvePoint]
    notes: list[str] = Field(default_factory=list)

    @property
    def absorbed(self) -> list[float]:
        """Shares taken in up to each depth, from 0 to all layers."""
        return [point.absorbed for point in self.points]


class CalibrationRow(Record):
    """A schedule, and how far answers under it are from the full model's.

    Attributes:
        name: of the schedule; of random tokens that of the schedule with ", random".
        layers: of each stage, decoder layers already run.
        kept: tokens that each stage leaves of an image of the usual size.
        kl: mean KL(full || compressed), nats, over the positions of the full model's answer.
        top1: share of these positions whose most probable token is the full model's.
        visual_tokens: of the full model, a sample, on average.
        average_kept: visual tokens averaged over the decoder layers, a sample, on average.
        flops: FLOPs of prefill and tower as a share of the full model's, scoring included; None where they are not
            known.
    """

    name: str
    layers: list[int]
    kept: list[int]
    kl: Estimate
    top1: Estimate
    visual_tokens: float
    average_kept: float
    flops: float | None

    @property
    def retention(self) -> float:
        """`average_kept` / `visual_tokens`; 1.0 without visual tokens."""
        return self.average_kept / self.visual_tokens if self.visual_tokens else 1.0

    def schedule(self) -> str:
        """As ``1: 27, 4: 16``: the layer of each stage, and the tokens that it leaves."""
        return ", ".join(f"{layer}: {kept}" for layer, kept in zip(self.layers, self.kept, strict=True))


class UnseenComparison(Record):
    """The chosen schedule against another on the same unseen samples.

    Attributes:
        other: name of the other one.
        kl: KL of the chosen one minus that of the other; below zero: the chosen one is nearer to the full model.
        top1: the same of the agreement; above zero is nearer.
        verdict: by the interval of `kl`: better where all of it is below zero, worse where all of it is above.
    """

    other: str
    kl: Estimate
    top1: Estimate
    verdict: Verdict

    def line(self, called: str | None = None) -> str:
        """As ``better than trio-soft-11``; `called`: in place of the other's name."""
        return f"{self.verdict} {_BEFORE[self.verdict]} {called or self.other}"


class CalibrationReport(Document):
    """A drop-all curve, the schedules that were tried, and the verdict on images that had no part in the choice.

    Attributes:
        version: of this format: 1.
        model: name of the model.
        budget: mean share of the visual tokens over the layers, as asked for.
        base: spec whose parts every schedule has.
        shipped: spec that the chosen schedule is held against.
        versions: of trio-vlm, torch and transformers.
        device: where it ran, and in which number format.
        max_new_tokens: longest answer of the full model.
        batch_size: samples in a batch.
        seed: of the split and the random tokens.
        calibration_images: names of the images that the curve and the choice are of.
        unseen_images: names of the others.
        curve: on the images of the calibration.
        rows: every schedule there; the last one is the shipped one.
        chosen: name of the one whose KL has the lowest upper end.
        unseen: on the other images: the chosen schedule, random tokens at its places, and the shipped one.
        against_shipped: the verdict.
        against_random: the same against as many tokens at the same places, drawn at random.
        wrote: name of the schedule that the spec has: the chosen one, or where it is worse the shipped one.
        spec: as plain data.
        notes: what a reader should know.
    """

    version: Literal[1] = 1
    model: str
    budget: str
    base: str
    shipped: str
    versions: dict[str, str]
    device: str
    dtype: str
    max_new_tokens: int
    batch_size: int
    seed: int
    calibration_images: list[str]
    unseen_images: list[str]
    curve: DropAllCurve
    rows: list[CalibrationRow]
    chosen: str
    unseen: list[CalibrationRow]
    against_shipped: UnseenComparison
    against_random: UnseenComparison
    wrote: str
    spec: dict[str, Any]
    notes: list[str] = Field(default_factory=list)

    def verdict(self) -> list[str]:
        """The verdict in a few lines."""
        images = f"{len(self.unseen_images)} unseen images"
        shipped, chance = self.against_shipped, self.against_random
        lines = []
        if shipped.verdict == "the same":
            lines.append(f"the schedule of {self.shipped} is the best of those tried: nothing is to be changed")
        else:
            lines.append(
                f"{self.chosen} is {shipped.line()} on {images}: KL {shipped.kl.change()} nats, "
                f"top-1 {shipped.top1.points()} points"
            )
        lines.append(f"{self.chosen} is {chance.line('random tokens at its places')}: KL {chance.kl.change()} nats")
        lines += self._costs()
        if shipped.verdict == "worse":
            kept = self.wrote == self.shipped
            lines.append(
                f"keep {self.shipped}: the spec has its schedule"
                if kept
                else f"the spec has the schedule {self.chosen}, as asked for, although it is worse"
            )
        return lines

    def _costs(self) -> list[str]:
        """What the chosen schedule costs beside the shipped one: as many tokens are not as many FLOPs."""
        by_name = {row.name: row.flops for row in self.unseen}
        mine, theirs = by_name.get(self.chosen), by_name.get(self.shipped)
        if self.chosen == self.shipped or mine is None or theirs is None:
            return []
        costs = f"{mine:.1%} of the full model's FLOPs, scoring included; {self.shipped}: {theirs:.1%}"
        return [f"prefill and tower cost {costs}"]

    def pipeline_spec(self) -> PipelineSpec:
        """The spec that was written."""
        return load_spec(self.spec)

    def file(self) -> str:
        """The spec as YAML, with the verdict and the curve as comments above it."""
        asked = f"{self.curve.samples} prompts on {self.curve.images} images"
        points = ", ".join(f"{point.depth}: {point.kl.mean:.3f}" for point in self.curve.points)
        head = [
            f"trio calibrate {self.model}, budget {self.budget}, parts of {self.base}, seed {self.seed}",
            *self.verdict(),
            f"KL (nats) where all visual tokens are dropped after so many layers, {asked}:",
            f"  {points}",
        ]
        comments = [f"# {visible(line, keep='')}\n" for line in head]
        return "".join(comments) + self.pipeline_spec().to_yaml()
