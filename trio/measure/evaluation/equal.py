"""Rows that a spec is compared with at equal cost, and rows of the curve over sizes of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ...core.upstream import patch_processor
from ...errors import TrioError
from ...spec import PipelineSpec
from ..equal_cost import AskedPrompt, equal_share, is_baseline, percent, pooled_spec
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
    for row in rows:
        if row.control or row.spec is None or is_baseline(row.spec):
            continue
        found = _row_for(runner, row, row.spec, answers["full"], answers[row.name])
        of[row.name] = made.setdefault(found.name, found).name
    return EqualRows(list(made.values()), of)


def _row_for(
    runner: Runner, row: EvaluationRow, spec: PipelineSpec, full: Sequence[RowAnswer], given: Sequence[RowAnswer]
) -> EvaluationRow:
    """The row that costs as much as `row`; refused where nothing does."""
    flops = [answer.answer_flops for answer in given if answer.answer_flops is not None]
    if runner.shape is None or len(flops) < len(given):
        return _refused(runner, row, runner.no_flops or "the answers are of a version that did not count them")
    samples = runner.task.samples
    prompts = Counter(
        AskedPrompt(
            whole.tokens, whole.text_tokens or 0, one.new_tokens or 1, runner.size_of[samples[one.question].scene]
        )
        for whole, one in zip(full, given, strict=True)
    )
    patches = patch_processor(runner.processor) if runner.by_size else None
    share = equal_share(runner.shape, patches, prompts, fmean(flops) + 0.5)
    if share is None:
        return _refused(runner, row, "no image, however small, costs as little")
    return _row(runner, "equal cost", share, row.schedule, spec)


def _refused(runner: Runner, row: EvaluationRow, reason: str) -> EvaluationRow:
    name = f"{runner.smaller}, equal cost, {row.schedule}"
    return EvaluationRow(name, name, "equal cost", row.schedule, refused=reason)


def _row(
    runner: Runner, control: Literal["size", "equal cost"], share: float, schedule: str, like: PipelineSpec
) -> EvaluationRow:
    """A smaller image with that share of the tokens, or pooled tokens."""
    said = f"{runner.smaller} to {100 * share:.1f}%"
    name = said if control == "size" else f"{said}, equal cost, {schedule}"
    if runner.by_size:
        return EvaluationRow(name, name, control, schedule, image="resized", tokens=share)
    spec = pooled_spec(percent(share), positions=like.positions)
    try:
        runner.pipeline(EvaluationRow(name, name, spec=spec))
    except TrioError as error:
        return EvaluationRow(name, name, control, schedule, refused=f"its features cannot be pooled: {error}")
    return EvaluationRow(name, name, control, schedule, spec)
