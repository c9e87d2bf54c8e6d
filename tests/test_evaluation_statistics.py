"""Intervals cover what they promise, corrections equal hand arithmetic, and the gate opens for the right reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from trio.measure.evaluation import wording
from trio.measure.evaluation.answers import RowAnswer
from trio.measure.evaluation.results import COUNTED, OVERALL, Comparison, EvaluationResults
from trio.measure.evaluation.rows import SEEDS, ControlSchedule, EvaluationRow, none_name
from trio.measure.evaluation.summary import Summary
from trio.measure.evaluation.task import LabelledSample, Task
from trio.measure.statistics import (
    Bootstrap,
    Paired,
    holm,
    needed_scenes,
    paired,
    power,
    scenes_to_reject,
    smallest_p,
)
from trio.spec import PipelineSpec

SCENES, EACH = 50, 6
SCENE = np.repeat(np.arange(SCENES), EACH)
ALL = np.ones(SCENES * EACH, bool)


def clustered(rng: np.random.Generator, mean: float) -> NDArray[np.float64]:
    """Answers whose scenes are easy or hard as wholes."""
    ease = rng.beta(mean * 2, (1 - mean) * 2, SCENES)
    return (rng.random(SCENES * EACH) < ease[SCENE]).astype(float)


def test_intervals_cover_the_truth_and_ones_without_clusters_would_not() -> None:
    rng, covered, naive, differences = np.random.default_rng(1), 0, 0, 0
    bootstrap = Bootstrap(SCENE.tolist(), draws=400)
    for _ in range(300):
        right = clustered(rng, 0.7)
        found = bootstrap.mean(right, ALL)
        covered += found.low <= 0.7 <= found.high
        width = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / len(right))
        naive += abs(right.mean() - 0.7) <= width
        gap = bootstrap.difference(right, clustered(rng, 0.6), ALL)
        differences += gap.low <= 0.1 <= gap.high
    assert 0.90 <= covered / 300 <= 0.98
    assert 0.90 <= differences / 300 <= 0.98
    assert naive / 300 < 0.85


def test_pairs_make_differences_narrow() -> None:
    rng = np.random.default_rng(2)
    bootstrap = Bootstrap(SCENE.tolist())
    right = clustered(rng, 0.7)
    other = right.copy()
    other[::29] = 1 - other[::29]
    alone, together = bootstrap.mean(right, ALL), bootstrap.difference(right, other, ALL)
    assert together.high - together.low < (alone.high - alone.low) / 2
    same = bootstrap.difference(right, right, ALL)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_all_right_still_has_an_interval() -> None:
    bootstrap = Bootstrap(SCENE.tolist())
    found = bootstrap.mean(np.ones(len(SCENE)), ALL)
    assert found.mean == 1 and found.high == pytest.approx(1)
    assert found.low == pytest.approx(SCENES / (SCENES + 1.96**2), abs=1e-4)  # Wilson, 50 scenes and not 300 questions


def test_what_is_retained() -> None:
    bootstrap = Bootstrap(SCENE.tolist())
    full, blind = np.ones(len(SCENE)), (np.arange(len(SCENE)) % 6 == 0).astype(float)
    half = (np.arange(len(SCENE)) % 6 < 3).astype(float)
    found = bootstrap.retained(half, full, blind, ALL)
    assert found is not None
    assert found.mean == pytest.approx((3 / 6 - 1 / 6) / (1 - 1 / 6))
    assert found.low == found.high == pytest.approx(found.mean)  # the same in every scene
    assert bootstrap.retained(half, blind, blind, ALL) is None  # nothing to retain
    nearly = blind.copy()
    nearly[1] = 1  # one question in 300 is no gain to be sure of
    assert bootstrap.retained(half, nearly, blind, ALL) is None


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_sign_flip_test_is_exact_and_holds_its_level() -> None:
    three = paired(np.array([1.0, 2.0, 1.0, 0.0]), np.full(4, 5.0))
    assert three.p == 2 / 8  # of eight signs, two are as extreme
    assert three.difference == 4 / 20
    assert paired(np.zeros(9), np.full(9, 5.0)).p == 1
    rng = np.random.default_rng(3)
    false = [paired(rng.normal(size=40), np.full(40, 5.0), flips=400).p < 0.05 for _ in range(300)]
    assert 0.02 <= np.mean(false) <= 0.09


@pytest.mark.parametrize("scenes", [1, 2, 5, 6, 13, 14, 50])
def test_the_smallest_p_is_that_of_the_largest_difference(scenes: int) -> None:
    largest = paired(np.full(scenes, 5.0), np.full(scenes, 5.0))
    assert largest.difference == 1
    if scenes <= 13:
        assert largest.p == smallest_p(scenes) == 2.0 ** (1 - scenes)
    else:
        assert smallest_p(scenes) == 1 / 10_001 <= largest.p < 0.001
    rng = np.random.default_rng(5)
    assert all(paired(rng.normal(size=scenes), np.ones(scenes)).p >= smallest_p(scenes) for _ in range(50))


@pytest.mark.parametrize("tests", [1, 2, 6, 30])
def test_from_so_many_scenes_on_a_difference_can_be_shown(tests: int) -> None:
    needed = scenes_to_reject(tests)
    for scenes, shown in ((needed - 1, False), (needed, True)):
        reached = holm({str(i): smallest_p(scenes) for i in range(tests)})
        assert all((p < 0.05) == shown for p in reached.values())
    assert scenes_to_reject(1) == 6 and scenes_to_reject(6) == 8


def inferior(truth: float, scenes: int, rng: np.random.Generator, runs: int = 400) -> float:
    """How often the test says "not worse by a point" where the first is `truth` points better."""
    said = 0
    for _ in range(runs):
        moved = rng.multinomial(1, [0.10 + truth / 200, 0.10 - truth / 200, 0.80], size=(scenes, 5))
        sums = (moved[..., 0].astype(float) - moved[..., 1]).sum(1)
        said += paired(sums, np.full(scenes, 5.0), flips=1).p_inferior(0.01) < 0.05
    return said / runs


def test_non_inferiority_holds_its_level_and_its_power() -> None:
    rng = np.random.default_rng(4)
    assert inferior(-1.0, 300, rng) <= 0.08  # truly worse by the margin
    some = Paired(0.0, 1.0, math.sqrt(0.2 / 5 / 300), 300)  # variance of a question 0.2
    wanted = needed_scenes(some, 0.01, tests=1)
    assert wanted == math.ceil(0.2 / 5 * ((1.645 + 1.2816) / 0.01) ** 2) or abs(wanted - 3426) <= 2
    assert inferior(0.0, wanted, rng, 200) == pytest.approx(0.9, abs=0.07)
    at = Paired(0.0, 1.0, math.sqrt(0.2 / 5 / wanted), wanted)
    assert power(at, 0.01, tests=1) == pytest.approx(0.9, abs=0.002)
    assert needed_scenes(some, 0.01, tests=5) > wanted
    alike = paired(np.zeros(30), np.full(30, 5.0))
    assert alike.p_inferior(0.01) > 0.05  # 150 equal answers are no proof of a difference below one point


def summary(right: dict[str, str], share: float = 0.111, each: int = 4) -> Summary:
    """A summary of made-up answers: two sub-tasks, `each` questions a scene."""
    samples = tuple(
        LabelledSample(None, f"{i}", ("yes",), "easy" if i % 2 else "hard", i // each)  # type: ignore[arg-type]  # never looked at
        for i in range(80)
    )
    task = Task("made up", 1, samples, 1)
    spec = PipelineSpec.parse({"stages": [{"after_layer": 0, "keep": "11.1%"}]})
    schedules = {"s": ControlSchedule("s", (0,), spec, share * 100, 100)}
    rows = [
        EvaluationRow("full", "full", "full"),
        EvaluationRow("no image", "no image", "no image"),
        EvaluationRow("ours", "ours", "", "s", spec),
        EvaluationRow("theirs", "theirs", "", "s", spec),
        EvaluationRow(none_name(0), none_name(0), "none"),
        *(EvaluationRow(f"random {seed}", "random, s", "random", "s", spec) for seed in SEEDS),
        EvaluationRow("oracle, s", "oracle, s", "oracle", "s", spec, refused="no map"),
    ]
    given = {row.name: right.get(row.group, right["full"]) for row in rows if not row.refused}
    answers = {
        name: [RowAnswer(i, "yes" if c == "1" else "no", 100, 11.0, None) for i, c in enumerate(text)]
        for name, text in given.items()
    }
    return Summary(task, rows, schedules, answers)


GOOD = {
    "full": "1" * 80,
    "no image": "01" * 20 + "00" * 20,  # easy: 50 %, hard: 0 %
    "random, s": "1100" * 20,
    none_name(0): "01" * 20 + "00" * 20,
    "ours": "1" * 72 + "0" * 8,
    "theirs": "1" * 60 + "0" * 20,
}


def test_the_gate_opens_where_all_four_conditions_hold() -> None:
    gates = {gate.kind: gate for gate in summary(GOOD).gates}
    assert gates["hard"].passes and gates["easy"].passes
    assert (gates["easy"].full, gates["easy"].sees, gates["easy"].random_loses, gates["easy"].late_loses) == (
        100.0,
        50.0,
        50.0,
        50.0,
    )
    assert gates["hard"].late_loses == 100


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("full", "1" * 64 + "10" * 8),  # easy falls to 80 %
        ("no image", "01" * 40),  # easy is answered without the image
        ("random, s", "01" * 40),  # and here by random tokens
        (none_name(0), "01" * 40),  # and here by tokens that are dropped too late
    ],
)
def test_each_condition_closes_the_gate_alone(row: str, text: str) -> None:
    found = summary({**GOOD, row: text})
    assert [gate.kind for gate in found.gates if gate.passes] == ["hard"]
    rows = {one.name: one for one in found.rows()}
    theirs = np.array([c == "1" for c in GOOD["theirs"]])[0::2]
    assert rows["theirs"].accuracy[COUNTED].mean == pytest.approx(100 * theirs.mean())
    assert rows["theirs"].accuracy[OVERALL].mean == pytest.approx(75)
    assert rows["oracle, s"].refused == "no map" and not rows["oracle, s"].accuracy
    assert all(one.kinds == ["hard"] and one.gated for one in found.comparisons())


def test_comparisons_are_signed_corrected_and_say_whether_anything_counts() -> None:
    found = summary(GOOD).comparisons()
    (methods,) = [one for one in found if one.row == "theirs"]
    assert methods.baseline == "ours" and methods.same_schedule
    assert methods.difference.mean == pytest.approx(-15)
    assert methods.p_baseline_inferior_holm < 0.05 < 1 - methods.p_baseline_inferior
    floors = [one for one in found if one.row == "random, s"]
    assert [one.baseline for one in floors] == ["ours", "theirs"]
    assert floors[0].difference.mean == pytest.approx(-40)
    assert all(one.p <= one.p_holm <= 1 for one in found)
    nothing = summary({**GOOD, "full": "0" * 80}).comparisons()
    assert not any(one.gated for one in nothing) and nothing[0].kinds == ["hard", "easy"]


def findings_of(scenes: int, right: dict[str, str]) -> tuple[list[str], list[list[str]], Summary]:
    """What is said about made-up answers to 80 questions on so many scenes, and the table of comparisons."""
    found = summary(right, each=80 // scenes)
    results = EvaluationResults(
        model={"name": "m", "visual_tokens": 100},
        task={"name": "made up", "kinds": {"hard": 40, "easy": 40}, "questions": 80, "scenes": scenes},
        settings={"margin": 1.0},
        versions={},
        rows=found.rows(),
        gates=found.gates,
        comparisons=found.comparisons(),
        questions={"scene": [], "kind": []},
        right=found.right,
    )
    return list(wording.findings(results)), wording.comparison_table(results)[2], found


def test_too_few_scenes_are_not_called_no_difference() -> None:
    """Where no answers could have passed, a large difference is not "not shown"; where they could, it is judged."""
    said, table, found = findings_of(4, GOOD)
    ours = next(line for line in said if line.startswith("ours against random, s"))
    assert "too few scenes to tell: +40.0" in ours and "p = 0.250" in ours
    assert "on 4 scenes no p can be below 0.250, a difference can be shown from 7 on." in ours
    assert not any("not shown to be above" in line or "NOT above" in line for line in said)
    assert any(line.startswith("theirs and ours: too few scenes to tell them apart (-15.0") for line in said)
    assert [row[2] for row in table] == [
        "1.000, too few scenes: 4 of 6",
        "0.250, too few scenes: 4 of 7",
        "0.625, too few scenes: 4 of 7",
    ]
    for one in found.comparisons():
        assert one.p_smallest <= one.p_holm and one.scenes == 4
    said, table, found = findings_of(20, GOOD)
    assert any(line.startswith("ours is above random, s: +40.0") for line in said)
    assert not any("too few" in line for line in said) and not any("too few" in row[2] for row in table)
    assert all(one.p_smallest < 0.05 and one.scenes == 20 for one in found.comparisons())
    nothing = findings_of(20, {**GOOD, "ours": GOOD["random, s"]})[0]
    assert any(line.startswith("ours is NOT above random, s") for line in nothing)


def test_results_of_before_are_judged_as_before() -> None:
    one = findings_of(4, GOOD)[2].comparisons()[0]
    old = {
        key: value for key, value in one.model_dump().items() if key not in ("p_smallest", "scenes", "scenes_needed")
    }
    assert Comparison.model_validate(old).p_smallest == 0
