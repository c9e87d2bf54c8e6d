"""What a measurement of fidelity found: pydantic records that serialise to JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...core.record import Document, Record
from ..statistics import Estimate
from .positions import PositionFidelity


class Times(Record):
    """Of one batch, from the call of `generate`: to the first token, and to the end of the answer.

    Seconds (medians over the batches), or ratios full / compressed (medians of the ratios of the same batch).
    """

    first_token: float
    answer: float


class Likenesses(Record):
    """Agreement with the full model, or the difference of two agreements.

    Attributes:
        top1: share of samples whose most probable first token is the full model's.
        kl: mean KL(full || compressed) of the first token's distribution, nats.
        exact: share of samples whose greedy answer is the full model's, to the letter.
        edit: mean similarity of the greedy answers, 0 to 1 (1 - Levenshtein / longer length, characters).
    """

    top1: Estimate
    kl: Estimate
    exact: Estimate
    edit: Estimate


class FidelityRow(Record):
    """One way of compressing.

    Attributes:
        name: of the spec; of a floor the spec's with ", random".
        spec: as plain data; None where a part has no registered name.
        agreement: with the full model.
        positions: at every position of the full model's answer, which is fed to both; None where the model cannot be
            made to say it, and in reports of earlier versions.
        visual_tokens: of the full model, a sample, on average.
        average_kept: visual tokens averaged over the decoder layers, a sample, on average.
        flops: FLOPs of prefill and tower as a share of the full model's, scoring included; None where the cost of the
            model or of a part is not known (`notes` says why).
        seconds: of a batch.
        speedup: full / compressed.
        notes: what a reader should know.
    """

    name: str
    spec: dict[str, Any] | None
    agreement: Likenesses
    positions: PositionFidelity | None = None
    visual_tokens: float
    average_kept: float
    flops: float | None
    seconds: Times
    speedup: Times
    notes: list[str] = Field(default_factory=list)

    @property
    def retention(self) -> float:
        """`average_kept` / `visual_tokens`; 1.0 without visual tokens."""
        return self.average_kept / self.visual_tokens if self.visual_tokens else 1.0


class SpecFidelity(Record):
    """A spec beside its floor: as many tokens, at the same places, drawn at random.

    Attributes:
        spec: the spec.
        floor: random tokens.
        gain: agreement of the spec minus that of the floor, on the same samples. Below zero for `kl` is better.
        equal_cost: the full model on smaller images that cost as much as the spec did on the first batch, or on pooled
            tokens where images have one size; None where nothing does, costs are not known, or the spec is just that.
        equal_gain: agreement of the spec minus that of `equal_cost`.
    """

    spec: FidelityRow
    floor: FidelityRow
    gain: Likenesses
    equal_cost: FidelityRow | None = None
    equal_gain: Likenesses | None = None

    def rows(self) -> list[FidelityRow]:
        """Spec, floor, and what costs as much."""
        return [self.spec, self.floor, *([self.equal_cost] if self.equal_cost is not None else [])]


class Asked(Record):
    """One sample: the answers of the full model and of each row, and the row's divergence and agreement.

    Attributes:
        image: its name.
        prompt: in words.
        full: the full model's answer.
        answers: of each row, left to itself.
        top1: of each row, whether its most probable first token is the full model's.
        kl: of each row, of the first token's distribution, nats.
        position_top1: as `top1` at every position of the full model's answer, which was fed.
        position_kl: as `kl` likewise.
    """

    image: str
    prompt: str
    full: str
    answers: dict[str, str]
    top1: dict[str, bool]
    kl: dict[str, float]
    position_top1: dict[str, list[bool]] = Field(default_factory=dict)
    position_kl: dict[str, list[float]] = Field(default_factory=dict)


class FidelityReport(Document):
    """How far compressed models answered as the full one did.

    Attributes:
        version: of this format: 1.
        model: name or class of the model.
        versions: of trio-vlm, torch and transformers.
        device: where it ran, and in which number format.
        images: how many; the samples of one image are drawn together by the intervals.
        max_new_tokens: longest answer; longer ones were compared up to there.
        batch_size: samples in a batch.
        seed: of the random choice of tokens.
        full: seconds of a batch of the full model.
        results: one for each spec, in the order given.
        asked: the samples with all answers.
        notes: what a reader should know.
    """

    version: Literal[1] = 1
    model: str
    versions: dict[str, str]
    device: str
    dtype: str
    images: int
    max_new_tokens: int
    batch_size: int
    seed: int
    full: Times
    results: list[SpecFidelity]
    asked: list[Asked]
    notes: list[str] = Field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.asked)

    def rows(self) -> list[FidelityRow]:
        """Every spec followed by its floor and by what costs as much."""
        return [row for result in self.results for row in result.rows()]

    def summary(self) -> str:
        """A few plain lines for people."""
        lines = [f"{self.model}: {self.samples} prompts on {self.images} images, full against compressed"]
        for row in self.rows():
            agreement = row.agreement
            lines.append(
                f"  {row.name}: {row.average_kept:.1f} of {row.visual_tokens:.1f} tokens; first token the same "
                f"{agreement.top1.percent()}, KL {agreement.kl.plain()} nats; same answer "
                f"{agreement.exact.percent()}, edit similarity {agreement.edit.plain()}; "
                f"{row.speedup.first_token:.2f}x to the first token, {row.speedup.answer:.2f}x to the end"
            )
            if row.positions is not None:
                found, worst = row.positions.overall, row.positions.worst
                lines.append(
                    f"    at every position of the full model's answer: the same token {found.top1.percent()}, KL "
                    f"{found.kl.plain()} nats; largest at {worst.name}: {worst.kl.plain()}"
                )
        lines += [f"  {one.spec.name} above random, points: top-1 {one.gain.top1.points()}" for one in self.results]
        lines += [
            f"  {one.spec.name} above equal cost, points: top-1 {one.equal_gain.top1.points()}"
            for one in self.results
            if one.equal_gain is not None
        ]
        lines += [f"  note: {note}" for note in self.all_notes()]
        return "\n".join(lines)

    def all_notes(self) -> list[str]:
        """The report's notes and those of its rows, each once."""
        return list(dict.fromkeys([*self.notes, *(note for row in self.rows() for note in row.notes)]))
