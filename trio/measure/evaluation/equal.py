"""Rows that a spec is compared with at equal cost, and rows of the curve over sizes of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Literal

from ...core.upstream import patch_processor
from ...cost import ModelShape
from ...errors import TrioError
from ...spec import PipelineSpec
from ..equal_cost import SHARES, AskedPrompt, dearest, mean_cost, pooled_cost, pooled_spec, resized_tokens, whole_cost
from .answers import RowAnswer
from .rows import EvaluationRow
from .runner import Runner

__all__ = ["EqualRows", "equal_cost", "size_rows"]


@dataclass(frozen=True)
class EqualRows:
    """What costs as much as the specs do.

    Attributes:
        rows: each once.
        of: by a spec's name, the name of its row.
    """

    rows: list[EvaluationRow]
    of: dict[str, str]


def size_rows(runner: Runner, shares: Sequence[float], specs: Sequence[PipelineSpec]) -> list[EvaluationRow]:
    """The full model on smaller images, or on pooled tokens where images have one size.

    Args:
        runner: of the model.
        shares: of an image's visual tokens, above 0 and up to 1.
        specs: of the evaluation, whose numbering of the survivors is taken.
    """
    return [_row(runner, "size", share, "", specs[0]) for share in dict.fromkeys(shares)]


def equal_cost(runner: Runner, rows: Sequence[EvaluationRow], answers: Mapping[str, Sequence[RowAnswer]]) -> EqualRows:
    """For each spec the largest image, or number of pooled tokens, that costs no more than the spec did.

    Costs are counted over all questions, tower and decoding included, for as many new tokens as the spec's own answers
    have. Specs that only resize or only pool are what they would be compared with, and get no row.

    Args:
        runner: of the model.
        rows: that ran.
        answers: by row.
    """
    made: dict[str, EvaluationRow] = {}
    of: dict[str, str] = {}
    costs = _Costs(runner)
    for row in rows:
        if row.control or row.spec is None or _is_baseline(row.spec):
            continue
        found = costs.row_for(row, row.spec, answers["full"], answers[row.name])
        of[row.name] = made.setdefault(found.name, found).name
    return EqualRows(list(made.values()), of)


def _is_baseline(spec: PipelineSpec) -> bool:
    pooled = spec.compressor is not None and spec.compressor.name == "average-pool"
    return not spec.stages and (spec.compressor is None or pooled)


class _Costs:
    """Costs of the model on smaller images, each worked out once."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._shape = runner, runner.shape
        self._patches = patch_processor(runner.processor) if runner.by_size else None
        self._typical = round(fmean(runner.counter.of_size(size) for size in runner.sizes))
        if self._patches is not None:
            self._tokens = cache(partial(resized_tokens, self._patches))

    def row_for(
        self, row: EvaluationRow, spec: PipelineSpec, full: Sequence[RowAnswer], given: Sequence[RowAnswer]
    ) -> EvaluationRow:
        """The row that costs as much as `row`; refused where nothing does."""
        flops = [answer.answer_flops for answer in given if answer.answer_flops is not None]
        if self._shape is None or len(flops) < len(given):
            return self._refused(row, self._runner.no_flops or "the answers are of a version that did not count them")
        samples = self._runner.task.samples
        prompts = Counter(
            AskedPrompt(
                whole.tokens,
                whole.text_tokens or 0,
                one.new_tokens or 1,
                self._runner.size_of[samples[one.question].scene],
            )
            for whole, one in zip(full, given, strict=True)
        )
        shares = SHARES if self._patches else [count / self._typical for count in range(1, self._typical + 1)]
        shape = self._shape
        share = dearest(shares, lambda one: mean_cost(prompts, partial(self._cost, shape, one)), fmean(flops) + 0.5)
        if share is None:
            return self._refused(row, "no image, however small, costs as little")
        return _row(self._runner, "equal cost", share, row.schedule, spec)

    def _cost(self, shape: ModelShape, share: float, one: AskedPrompt) -> int:
        if self._patches is not None:
            return whole_cost(shape, self._tokens(one.size, share), one.text, one.new)
        return pooled_cost(shape, _percent(share), one.tokens, one.text, one.new)

    def _refused(self, row: EvaluationRow, reason: str) -> EvaluationRow:
        name = f"{self._runner.smaller}, equal cost, {row.schedule}"
        return EvaluationRow(name, name, "equal cost", row.schedule, refused=reason)


def _row(
    runner: Runner, control: Literal["size", "equal cost"], share: float, schedule: str, like: PipelineSpec
) -> EvaluationRow:
    """A smaller image with that share of the tokens, or pooled tokens."""
    said = f"{runner.smaller} to {100 * share:.1f}%"
    name = said if control == "size" else f"{said}, equal cost, {schedule}"
    if runner.by_size:
        return EvaluationRow(name, name, control, schedule, image="resized", tokens=share)
    spec = pooled_spec(_percent(share), positions=like.positions)
    try:
        runner.pipeline(EvaluationRow(name, name, spec=spec))
    except TrioError as error:
        return EvaluationRow(name, name, control, schedule, refused=f"its features cannot be pooled: {error}")
    return EvaluationRow(name, name, control, schedule, spec)


def _percent(share: float) -> str:
    return f"{100 * share:.4f}%"
