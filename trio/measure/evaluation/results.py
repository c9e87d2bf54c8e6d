"""What `trio eval` writes: pydantic records, one JSON file. `docs/evaluation.md` describes every field.

Shares and accuracies are percent, differences are points; intervals are 95%.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from ...core.files import read_plain
from ...core.record import Record
from ...errors import InputError
from ..statistics import Estimate

__all__ = ["Comparison", "EvaluationResults", "Gate", "RowResult", "Speed"]

SCHEMA_VERSION = 1
OVERALL, COUNTED = "overall", "counted"


class RowResult(Record):
    """One row of the table.

    Attributes:
        name: of the row; the five draws of random are one row.
        control: which control it is; empty for a spec that was asked for.
        schedule: layers and share of the schedule that it belongs to; empty where it belongs to none.
        spec: what ran, None for the model as it is (a scorer without a registered name stands by its class's name).
        refused: why it could not run here; empty where it did. All fields below are then empty.
        draws: names of the single runs, keys of `EvaluationResults.right`.
        tokens: mean visual tokens of the images shown.
        average: mean visual tokens, averaged over the decoder layers.
        flops: mean FLOPs of a prefill with its vision tower, counted; None where the model is not known.
        answer_flops: the same of a whole answer, decoding included; also None in results of earlier versions.
        equal_cost: of a spec, the name of the row that costs as much: a smaller image, or pooled tokens.
        accuracy: by sub-task; under ``overall`` of all questions and ``counted`` of those that pass the gate.
        retained: percent of (accuracy - no image) / (full - no image), likewise; None where full is not above.
        spread: lowest and highest accuracy overall among the draws.
        anls: percent, the mean similarity of the answers to the right ones, by sub-task and ``overall``; empty where
            the task asks for right answers alone.
    """

    name: str
    control: str = ""
    schedule: str = ""
    spec: dict[str, Any] | None = None
    refused: str = ""
    draws: list[str] = Field(default_factory=list)
    tokens: float | None = None
    average: float | None = None
    flops: float | None = None
    answer_flops: float | None = None
    equal_cost: str = ""
    accuracy: dict[str, Estimate] = Field(default_factory=dict)
    retained: dict[str, Estimate | None] = Field(default_factory=dict)
    spread: tuple[float, float] | None = None
    anls: dict[str, Estimate] = Field(default_factory=dict)

    @field_validator("control")
    @classmethod
    def _renamed(cls, value: str) -> str:
        """What results of earlier versions call ``lower resolution`` has as many tokens, not as low a cost."""
        return "equal tokens" if value == "lower resolution" else value


class Gate(Record):
    """Whether a sub-task measures the choice of tokens, at the first stage's layer of some specs.

    Attributes:
        kind: the sub-task.
        first: decoder layers before the first stage.
        full: accuracy of the full model; 90 or more passes.
        sees: full minus no image; 30 or more passes.
        random_loses: full minus random at about 11%; 10 or more passes.
        random_row: which random row that was.
        late_loses: full minus everything dropped at that layer; 10 or more passes.
        passes: all four.
    """

    kind: str
    first: int
    full: float
    sees: float
    random_loses: float
    random_row: str
    late_loses: float
    passes: bool


class Comparison(Record):
    """A row minus the baseline on the questions that count for both, in points.

    Attributes:
        row: the row.
        baseline: what it is compared with.
        same_schedule: whether both keep the same number of tokens at the same layers.
        kinds: the sub-tasks that pass the gate for both; all of them where none does.
        gated: whether any did.
        difference: with its interval.
        p: two-sided, of no difference.
        p_holm: corrected over the comparisons with this baseline.
        p_smallest: the smallest `p_holm` that any answers to these scenes could give; from 0.05 on, none could show a
            difference. 0 where it was not worked out (results of earlier versions), as the two numbers of scenes.
        scenes: with a question that counts.
        scenes_needed: from which a difference could be shown at all, however large.
        p_baseline_inferior: one-sided, of the baseline being worse than the row by `margin` or more.
        p_baseline_inferior_holm: corrected; below 0.05 the baseline is non-inferior.
        margin: in points.
        power: of that test at these scenes, were both alike.
        scenes_for_90: scenes that give it a power of 90%.
    """

    row: str
    baseline: str
    same_schedule: bool
    kinds: list[str]
    gated: bool
    difference: Estimate
    p: float
    p_holm: float
    p_baseline_inferior: float
    p_baseline_inferior_holm: float
    margin: float
    power: float
    scenes_for_90: int
    p_smallest: float = 0.0
    scenes: int = 0
    scenes_needed: int = 0


class Speed(Record):
    """Seconds of one batch, medians over rounds in which all rows took turns.

    Attributes:
        first_token: until the first token.
        answer: until the whole answer.
        rounds: how many were measured.
        batch: questions in the batch.
    """

    first_token: float
    answer: float
    rounds: int
    batch: int


class EvaluationResults(Record):
    """One evaluation.

    Attributes:
        schema_version: of this format: 1.
        model: name, class, sha256 of the weights, layers, dtype, visual tokens of a typical image.
        task: name, version, facts, sha256 of what was asked, questions by sub-task, scenes.
        settings: batch size, longest answer, draws of the bootstrap, baseline, margin.
        versions: of trio-vlm, torch and transformers.
        rows: the table.
        gates: by sub-task and first layer.
        comparisons: with the baseline of each schedule.
        notes: what a reader should know.
        questions: columns ``scene`` and ``kind``, in the order of the task.
        right: by run, one character a question: 1 right, 0 wrong.
        device: where it ran.
        speed: by row, measured; the only part that a second run does not give again.
    """

    schema_version: Literal[1] = 1
    model: dict[str, Any]
    task: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[RowResult]
    gates: list[Gate]
    comparisons: list[Comparison]
    notes: list[str] = Field(default_factory=list)
    questions: dict[str, list[Any]]
    right: dict[str, str]
    device: str = "cpu"
    speed: dict[str, Speed] = Field(default_factory=dict)

    def row(self, name: str) -> RowResult:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def methods(self) -> list[RowResult]:
        """Rows of the specs that were asked for."""
        return [row for row in self.rows if not row.control]

    def control(self, control: str, schedule: str = "") -> RowResult | None:
        """A control's row, of a schedule or of none."""
        return next((r for r in self.rows if r.control == control and r.schedule in (schedule, "")), None)

    @property
    def kinds(self) -> list[str]:
        """Sub-tasks in their order."""
        return list(self.task["kinds"])

    def to_json(self) -> str:
        """One JSON object; `load` reads it back."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, file: str | Path) -> EvaluationResults:
        """Reads a results file.

        Raises:
            InputError: it cannot be read, or is of another format.
        """
        remedy = "give a results.json of this version of `trio eval`."
        data = read_plain(Path(file), f"results {str(file)!r}", remedy)
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InputError(
                f"results {str(file)!r}: cannot be read ({error.error_count()} fields are wrong); {remedy}"
            ) from error

    def to_csv(self) -> str:
        """A line a row and sub-task, for spreadsheets."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        columns = "row control schedule kind questions accuracy low high retained retained_low retained_high"
        table.writerow(
            [
                *columns.split(),
                "tokens",
                "average_tokens",
                "flops",
                "answer_flops",
                "first_token_s",
                "answer_s",
                "refused",
            ]
        )
        counts = {**self.task["kinds"], OVERALL: len(self.questions["kind"])}
        for row in self.rows:
            speed = self.speed.get(row.name)
            tail = [row.tokens, row.average, row.flops, row.answer_flops]
            tail += [None, None] if speed is None else [speed.first_token, speed.answer]
            for kind, found in row.accuracy.items():
                kept = row.retained.get(kind)
                middle: list[float | None] = [found.mean, found.low, found.high]
                middle += [None, None, None] if kept is None else [kept.mean, kept.low, kept.high]
                cells = [f"{v:.4g}" if isinstance(v, float) else v for v in (*middle, *tail)]
                table.writerow([row.name, row.control, row.schedule, kind, counts.get(kind, ""), *cells, ""])
            if row.refused:
                table.writerow([row.name, row.control, row.schedule, "", *[""] * 13, row.refused])
        return out.getvalue()
