"""What is gathered of one way of compressing while a measurement runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ...cost import ModelShape, of_report
from ...errors import TrioError
from ...pipeline import Pipeline
from ...report import CompressionReport
from ...spec import PipelineSpec
from ..answering import BatchAnswers, GreedyAnswerer
from ..statistics import Bootstrap
from ..teacher import PositionAgreement
from .compare import Likeness
from .positions import Positions
from .report import FidelityRow, Likenesses, Times

#: Seconds to the first token and to the end, of one batch.
Pair = tuple[float, float]


@dataclass
class Tokens:
    """Visual tokens and FLOPs, added up over batches."""

    visual: int = 0
    kept: float = 0.0
    full_flops: int = 0
    flops: int = 0
    unknown: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def add(
        self,
        report: CompressionReport,
        spec: PipelineSpec,
        shape: ModelShape | None,
        before: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Adds a batch's report.

        Args:
            report: of the batch.
            spec: that ran.
            shape: of the model; None where its cost is not known.
            before: visual tokens of each prompt's images in front of the spec's `resize`; None: it has none.
        """
        self.visual += report.visual_tokens if before is None else sum(map(sum, before))
        self.kept += report.average_kept
        self.notes.update(dict.fromkeys(report.notes))
        if shape is None or self.unknown:
            return
        try:
            cost = of_report(report, spec, shape, before=before)
        except TrioError as error:
            self.unknown = str(error)
            return
        self.full_flops += cost.full.flops.total
        self.flops += cost.compressed.flops.total
        self.notes.update(dict.fromkeys(cost.notes))

    @property
    def flops_share(self) -> float | None:
        """FLOPs of prefill and tower, compressed / full; None where they are not known."""
        return self.flops / self.full_flops if self.full_flops and not self.unknown else None


class Way:
    """A spec, or several draws of a random one that batches take in turn."""

    def __init__(self, specs: Sequence[PipelineSpec], answerer: GreedyAnswerer) -> None:
        """Builds the pipelines, which share the answerer's adapter.

        Raises:
            TrioError: a spec does not fit the model.
        """
        self.spec = specs[0]
        self.pipelines = [Pipeline.from_spec(spec, answerer.adapter.model, adapter=answerer.adapter) for spec in specs]
        self.tokens = Tokens()
        self.likenesses: list[Likeness] = []
        self.positions: list[PositionAgreement] = []
        self.texts: list[str] = []
        self.seconds: list[Pair] = []

    def pipeline(self, batch: int) -> Pipeline:
        """The pipeline for a batch."""
        return self.pipelines[batch % len(self.pipelines)]

    def add(
        self,
        answered: BatchAnswers,
        likenesses: Sequence[Likeness],
        shape: ModelShape | None,
        before: Sequence[Sequence[int]] | None,
    ) -> None:
        """Adds a batch; `before` as of `Tokens.add`, whatever this way does."""
        assert answered.report is not None  # every way has a pipeline
        resized = self.spec.resize is not None
        self.tokens.add(answered.report, self.spec, shape, before if resized else None)
        self.likenesses += likenesses
        self.texts += answered.texts

    def row(self, images: Sequence[str], full: Sequence[Pair], positions: Positions | None) -> FidelityRow:
        """What was found, with intervals over images.

        Args:
            images: name of each sample's image.
            full: times of the full model on the same batches.
            positions: of the full model's answers; None where they were not compared.
        """
        count = len(self.likenesses)
        notes = [*self.tokens.notes, *([f"FLOPs are not known: {self.tokens.unknown}"] if self.tokens.unknown else [])]
        try:
            plain = self.spec.to_dict()
        except TrioError as error:
            plain = None
            notes.append(f"the spec cannot be written down: {error}")
        return FidelityRow(
            name=self.spec.name,
            spec=plain,
            agreement=agreement(self.likenesses, images),
            positions=None if positions is None else positions.summarised(self.positions),
            visual_tokens=self.tokens.visual / count,
            average_kept=self.tokens.kept / count,
            flops=self.tokens.flops_share,
            seconds=middle(self.seconds),
            speedup=middle([(a / b, c / d) for (a, c), (b, d) in zip(full, self.seconds, strict=True)]),
            notes=notes,
        )


def middle(pairs: Sequence[Pair]) -> Times:
    """Medians of pairs of numbers."""
    return Times(first_token=median(one for one, _ in pairs), answer=median(two for _, two in pairs))


def agreement(likenesses: Sequence[Likeness], images: Sequence[str]) -> Likenesses:
    """Means with intervals."""
    draws = _draws(images)
    return Likenesses(
        top1=draws.share([float(one.top1) for one in likenesses]),
        kl=draws.number([one.kl for one in likenesses]),
        exact=draws.share([float(one.exact) for one in likenesses]),
        edit=draws.share([one.edit for one in likenesses]),
    )


def gain(spec: Sequence[Likeness], floor: Sequence[Likeness], images: Sequence[str]) -> Likenesses:
    """Agreement of a spec minus that of its floor on the same samples, with intervals."""
    pairs = list(zip(spec, floor, strict=True))
    draws = _draws(images)
    return Likenesses(
        top1=draws.number([float(one.top1) - float(two.top1) for one, two in pairs]),
        kl=draws.number([one.kl - two.kl for one, two in pairs]),
        exact=draws.number([float(one.exact) - float(two.exact) for one, two in pairs]),
        edit=draws.number([one.edit - two.edit for one, two in pairs]),
    )


def _draws(images: Sequence[str]) -> Bootstrap:
    """Draws in which the samples of one image stay together."""
    number = {name: index for index, name in enumerate(dict.fromkeys(images))}
    return Bootstrap([number[name] for name in images], one_by_one=True)
