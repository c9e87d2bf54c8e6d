"""From answers to results: accuracies, gates and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics import (
    FLIPS,
    Bootstrap,
    Estimate,
    holm,
    needed_scenes,
    paired,
    power,
    scenes_to_reject,
    smallest_p,
)
from .answers import RowAnswer
from .results import COUNTED, OVERALL, Comparison, Gate, RowResult
from .rows import GATE_NEAR, GATE_SHARE, ControlSchedule, EvaluationRow, none_name
from .task import Task

__all__ = ["Summary", "right_of"]

FULL, SEES, LOSES = 90.0, 30.0, 10.0
#: Specs whose average shares differ by no more than this are compared with each other.
SAME_BUDGET = 0.015
#: Controls that every spec has to beat.
FLOORS = ("random", "uniform", "equal tokens")
_NO_DRAW = np.zeros(0)


def right_of(task: Task, answers: Sequence[RowAnswer]) -> str:
    """Which questions were answered right, one character each."""
    return "".join("01"[s.is_right(a.text)] for s, a in zip(task.samples, answers, strict=True))


@dataclass
class _Group:
    """The draws of one row of the table."""

    row: EvaluationRow
    draws: list[str]
    values: NDArray[np.float64]


class Summary:
    """All answers of an evaluation, and what is made of them."""

    def __init__(
        self,
        task: Task,
        rows: Sequence[EvaluationRow],
        schedules: Mapping[str, ControlSchedule],
        answers: Mapping[str, Sequence[RowAnswer]],
        *,
        equal: Mapping[str, str] | None = None,
        baseline: str | None = None,
        margin: float = 1.0,
        draws: int = 2000,
    ) -> None:
        """Counts.

        Args:
            task: the questions.
            rows: all rows, refused ones too.
            schedules: by label.
            answers: by row, in the order of the questions.
            equal: by a spec's name, the name of the row that costs as much.
            baseline: name of the spec that others are compared with; by default the first one of each budget.
            margin: of non-inferiority, in points.
            draws: of the bootstrap.
        """
        self._task, self._schedules, self._answers = task, schedules, answers
        self._baseline, self._margin, self._equal = baseline, margin, dict(equal or {})
        self.right = {name: right_of(task, given) for name, given in answers.items()}
        self._kind = np.asarray([sample.kind for sample in task.samples])
        self._bootstrap = Bootstrap([sample.scene for sample in task.samples], draws)
        self._groups: dict[str, _Group] = {}
        for group in dict.fromkeys(row.group for row in rows):
            members = [row for row in rows if row.group == group]
            names = [row.name for row in members if not row.refused]
            values = [np.asarray([c == "1" for c in self.right[name]], float) for name in names]
            self._groups[group] = _Group(members[0], names, np.mean(values, axis=0) if values else _NO_DRAW)
        self.gates = self._gates()

    # The parts of the results

    def rows(self) -> list[RowResult]:
        """The table."""
        return [self._row(group) for group in self._groups.values()]

    def comparisons(self) -> list[Comparison]:
        """In each budget: every other spec against the baseline, then every spec's floors against it.

        The two are families of their own for Holm's correction.
        """
        comparisons: list[Comparison] = []
        waiting = [group for group in self._groups.values() if not group.row.control]
        while waiting:
            base = next((g for g in waiting if g.row.group == self._baseline), waiting[0])
            share = self._schedules[base.row.schedule].share
            near = [
                group
                for group in waiting
                if self._baseline is not None or abs(self._schedules[group.row.schedule].share - share) <= SAME_BUDGET
            ]
            waiting = [group for group in waiting if group not in near]
            comparisons += self._family([(group, base) for group in near if group is not base])
            comparisons += self._family([(floor, group) for group in near for floor in self._floors(group)])
        return comparisons

    def _floors(self, group: _Group) -> list[_Group]:
        return [
            one
            for one in self._groups.values()
            if one.draws
            and (
                (one.row.control in FLOORS and one.row.schedule == group.row.schedule)
                or one.row.group == self._equal.get(group.row.name)
            )
        ]

    # Rows

    def _row(self, group: _Group) -> RowResult:
        row = group.row
        spec = None if row.spec is None else _plain(row)
        common: dict[str, Any] = {"control": row.control, "schedule": row.schedule, "spec": spec}
        if not group.draws:
            return RowResult(name=row.group, refused=row.refused, **common)
        given = [answer for name in group.draws for answer in self._answers[name]]
        flops = [answer.flops for answer in given if answer.flops is not None]
        whole = [answer.answer_flops for answer in given if answer.answer_flops is not None]
        each = [100 * self.right[name].count("1") / len(self._kind) for name in group.draws]
        parts = {kind: self._kind == kind for kind in self._task.kinds}
        parts[OVERALL] = np.ones(len(self._kind), bool)
        counted = np.isin(self._kind, self.counted(self._first(row)))
        if counted.any():
            parts[COUNTED] = counted
        full, blind = self._groups["full"].values, self._groups["no image"].values
        return RowResult(
            name=row.group,
            draws=group.draws,
            tokens=round(float(np.mean([answer.tokens for answer in given])), 2),
            average=round(float(np.mean([answer.average for answer in given])), 2),
            flops=round(float(np.mean(flops))) if len(flops) == len(given) else None,
            answer_flops=round(float(np.mean(whole))) if len(whole) == len(given) else None,
            equal_cost=self._equal.get(row.name, ""),
            accuracy={name: _percent(self._bootstrap.mean(group.values, part)) for name, part in parts.items()},
            retained={
                name: None
                if (kept := self._bootstrap.retained(group.values, full, blind, part)) is None
                else _percent(kept)
                for name, part in parts.items()
            },
            spread=(min(each), max(each)) if len(each) > 1 else None,
            anls=self._similarities(group, parts),
            **common,
        )

    def _similarities(self, group: _Group, parts: Mapping[str, NDArray[np.bool_]]) -> dict[str, Estimate]:
        """The mean similarity of a row's answers, where the task is graded."""
        if not self._task.graded:
            return {}
        draws = [
            [
                sample.similarity(answer.text)
                for sample, answer in zip(self._task.samples, self._answers[name], strict=True)
            ]
            for name in group.draws
        ]
        mean = np.mean(draws, axis=0)
        return {name: _percent(self._bootstrap.mean(mean, part)) for name, part in parts.items()}

    def _first(self, row: EvaluationRow) -> int:
        """Layer of the first stage; for the full model that of the first spec."""
        for first in {one.first for one in self._schedules.values()}:
            if row.name == none_name(first):
                return first
        label = row.schedule or next(iter(self._schedules))
        return self._schedules[label].first

    # Gates

    def counted(self, first: int) -> list[str]:
        """Sub-tasks that pass the gate at a layer."""
        return [gate.kind for gate in self.gates if gate.first == first and gate.passes]

    def _gates(self) -> list[Gate]:
        gates = []
        for first in sorted({one.first for one in self._schedules.values()}):
            random = self._random(first)
            for kind in self._task.kinds:
                chosen = self._kind == kind
                full, blind, floor, late = (
                    100 * float(self._groups[name].values[chosen].mean())
                    for name in ("full", "no image", random, none_name(first))
                )
                passes = full >= FULL and full - blind >= SEES and min(full - floor, full - late) >= LOSES
                gates.append(
                    Gate(
                        kind=kind,
                        first=first,
                        full=round(full, 3),
                        sees=round(full - blind, 3),
                        random_loses=round(full - floor, 3),
                        random_row=random,
                        late_loses=round(full - late, 3),
                        passes=passes,
                    )
                )
        return gates

    def _random(self, first: int) -> str:
        """The random row nearest to 11%, at the same first layer where there is one."""

        def distance(group: _Group) -> tuple[bool, bool, float]:
            schedule = self._schedules[group.row.schedule]
            off = abs(schedule.share - GATE_SHARE)
            return off > GATE_NEAR and not schedule.label.endswith("there"), schedule.first != first, off

        return min((g for g in self._groups.values() if g.row.control == "random"), key=distance).row.group

    # Comparisons

    def _family(self, pairs: Sequence[tuple[_Group, _Group]]) -> list[Comparison]:
        parts, tests, differences = [], {}, []
        flips = max(FLIPS, 40 * len(pairs))  # so many that Holm's factor alone rejects nothing
        for number, (group, base) in enumerate(pairs):
            firsts = {self._first(base.row), self._first(group.row)}
            kinds = [kind for kind in self._task.kinds if all(kind in self.counted(first) for first in firsts)]
            parts.append((kinds or self._task.kinds, bool(kinds)))
            chosen = np.isin(self._kind, parts[-1][0])
            tests[str(number)] = paired(*self._bootstrap.by_scene(base.values - group.values, chosen), flips=flips)
            differences.append(_percent(self._bootstrap.difference(group.values, base.values, chosen)))
        margin = self._margin / 100
        p_values = holm({name: test.p for name, test in tests.items()})
        smallest = holm({name: smallest_p(test.scenes, flips=flips) for name, test in tests.items()})
        inferior = {name: test.p_inferior(margin) for name, test in tests.items()}
        corrected = holm(inferior)
        return [
            Comparison(
                row=group.row.group,
                baseline=base.row.group,
                same_schedule=group.row.schedule == base.row.schedule,
                kinds=part[0],
                gated=part[1],
                difference=difference,
                p=tests[name].p,
                p_holm=p_values[name],
                p_baseline_inferior=inferior[name],
                p_baseline_inferior_holm=corrected[name],
                margin=self._margin,
                power=power(tests[name], margin, tests=len(tests)),
                scenes_for_90=needed_scenes(tests[name], margin, tests=len(tests)),
                p_smallest=smallest[name],
                scenes=tests[name].scenes,
                scenes_needed=scenes_to_reject(len(tests)),
            )
            for (group, base), name, part, difference in zip(pairs, tests, parts, differences, strict=True)
        ]


def _percent(share: Estimate) -> Estimate:
    return share.scaled(100, 3)


def _plain(row: EvaluationRow) -> dict[str, Any]:
    """A spec as plain data; parts that are objects stand by their class's name."""
    assert row.spec is not None
    data: dict[str, Any] = row.spec.model_dump(mode="json", exclude_defaults=True)
    return data
