"""ShapesVQA: every trap that a benchmark of this kind can fall into is closed, and the data set does not change."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest

import trio
from trio.measure.evaluation.task import Task
from trio.measure.shapesvqa.questions import Question
from trio.measure.shapesvqa.scenes import COLOURS, HELD_OUT, SHAPES, Scene
from trio.measure.shapesvqa.task import CANVASES, SPLITS, SUBTASKS, Canvas, drawn_scenes, reveals, shapesvqa

SCENES = 150
#: SHA-256 of the questions; who changes them must raise `VERSION`, since committed results refer to them.
FINGERPRINTS = {
    ("test", "square"): "c4f26166590d068c5492437bec7a37e5dae74843f697538bbb2bf3c7b5c77ed2",
    ("test", "varied"): "10389b94d22630c08da8d2f7e2448406a0ef7ea8a3a18a1aec8aaae8687655b3",
    ("validation", "square"): "94da930c6e2965a6eda9779071e06628db3d5304788eae6015fa9342ccd616df",
    ("novel", "varied"): "bed99fd863170d784695fdda20117bc90142b012ae9f6cf1c9d1a2efc53df588",
}


@pytest.fixture(scope="module", params=CANVASES)
def canvas(request: pytest.FixtureRequest) -> Canvas:
    chosen: Canvas = request.param
    return chosen


@pytest.fixture(scope="module")
def task(canvas: Canvas) -> Task:
    return shapesvqa(limit=SCENES, canvas=canvas)


@pytest.fixture(scope="module")
def scenes(task: Task, canvas: Canvas) -> list[Scene]:
    return list(islice(drawn_scenes("test", canvas, task.facts["seed"]), SCENES))


@pytest.mark.parametrize(("split", "canvas"), FINGERPRINTS)
def test_the_questions_do_not_change_between_releases(split: str, canvas: Canvas) -> None:
    task = shapesvqa(split, limit=40, canvas=canvas)  # type: ignore[arg-type]  # a parameter of the test
    assert task.fingerprint() == FINGERPRINTS[split, canvas]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(task: Task, canvas: Canvas) -> None:
    few = shapesvqa(limit=10, canvas=canvas)
    assert [s.question for s in few.samples] == [s.question for s in task.samples[: len(few.samples)]]
    assert few.samples[-1].load().tobytes() == task.samples[len(few.samples) - 1].load().tobytes()


def test_splits_share_no_image() -> None:
    some = [shapesvqa(split, limit=20) for split in ("test", "validation", "novel")]
    images = [{sample.load().tobytes() for sample in one.samples} for one in some]
    assert [len(one) for one in images] == [20, 20, 20]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]


def test_the_foreground_is_at_least_three_times_the_smallest_budget(scenes: list[Scene]) -> None:
    for scene in scenes:
        touched = scene.coverage().sum(0) > 0.2
        assert touched.mean() >= 3 * 0.111
        assert (scene.item_map > 0).mean() >= 0.2  # and not by their edges alone


def test_answers_are_balanced_within_each_sub_task(task: Task) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in task.samples:
        answers[sample.kind][sample.answers[0]] += 1
    assert set(answers) == set(SUBTASKS)
    for kind, counts in answers.items():
        total, top = sum(counts.values()), counts.most_common(1)[0][1]
        if kind.startswith("existence"):
            assert abs(counts["yes"] - counts["no"]) <= 1
        elif kind == "number":
            del counts["none"]
            assert max(counts.values()) <= 4 and len(counts) >= 45
        else:
            fair = {"colour": 9, "shape": 7, "relation": 4, "corner": 4, "count": 4, "same": 7}[kind]
            assert len(counts) == fair
            assert top / total <= 1.8 / fair


def test_no_word_of_a_question_gives_its_answer_away(task: Task) -> None:
    """Who answers by the wording alone, knowing how often each answer goes with it, gains little over chance."""
    for kind, chance in (("count", 0.25), ("relation", 0.25), ("corner", 0.25), ("existence-adversarial", 0.5)):
        samples = [s for s in task.samples if s.kind == kind]
        half = len(samples) // 2
        for word in {word for s in samples for word in s.question.rstrip("?").split()}:
            told = Counter(s.answers[0] for s in samples[:half] if word in s.question.rstrip("?").split())
            rest = [s.answers[0] for s in samples[half:] if word in s.question.rstrip("?").split()]
            if sum(told.values()) >= 20 and len(rest) >= 20:
                guess = told.most_common(1)[0][0]
                hits = np.mean([answer == guess for answer in rest])
                assert hits <= chance + 3 * np.sqrt(chance * (1 - chance) / len(rest))


def test_absent_things_are_asked_about(task: Task) -> None:
    for kind in ("colour", "shape", "number", "same"):
        none = [s for s in task.samples if s.kind == kind and s.answers == ("none",)]
        share = len(none) / sum(s.kind == kind for s in task.samples)
        assert 0.05 < share < 0.3
        assert kind == "same" or all(not s.about for s in none)
    assert any(s.kind == "count" and s.answers == ("zero",) for s in task.samples)


def test_negatives_are_as_near_as_their_name_says(task: Task, scenes: list[Scene]) -> None:
    for sample in task.samples:
        if not sample.kind.startswith("existence"):
            continue
        scene = scenes[sample.scene]
        colour, shape = sample.question.rstrip("?").split()[-2:]
        items = [scene.items[i] for i in scene.shapes]
        there = any((item.colour, item.shape) == (colour, shape) for item in items)
        assert sample.answers == ("yes" if there else "no",)
        if not there:
            near = any(item.colour == colour for item in items) + any(item.shape == shape for item in items)
            assert sample.kind == f"existence-{('random', 'popular', 'adversarial')[near]}"


def test_held_out_combinations_are_in_the_split_novel_only(task: Task, scenes: list[Scene], canvas: Canvas) -> None:
    pairs = {(item.colour, item.shape) for scene in scenes for item in scene.items}
    assert not pairs & HELD_OUT
    assert not any(f"{c} {s}" in sample.question for c, s in HELD_OUT for sample in task.samples)
    novel = shapesvqa("novel", limit=20, canvas=canvas)
    assert any(f"{c} {s}" in sample.question for c, s in HELD_OUT for sample in novel.samples)


def test_no_question_reveals_anothers_answer(task: Task) -> None:
    by_scene: dict[int, list[Question]] = defaultdict(list)
    for s in task.samples:
        by_scene[s.scene].append(Question(s.kind.partition("-")[0], s.question, s.answers[0], s.about))
    for questions in by_scene.values():
        assert len({q.text for q in questions}) == len(questions)
        for one in questions:
            assert not any(reveals(other.text, one) for other in questions if other is not one)


def test_what_reveals_an_answer() -> None:
    corner = "in which corner is the red circle?"
    assert reveals(corner, Question("existence", "is there a red circle?", "yes"))
    assert reveals(corner, Question("colour", "what colour is the circle?", "red"))
    assert reveals(corner, Question("shape", "what is the red shape?", "circle"))
    assert reveals("what colour is the cross?", Question("count", "how many crosses are there?", "one"))
    assert reveals("what is the red shape?", Question("count", "how many red shapes are there?", "one"))
    assert not reveals(corner, Question("existence", "is there a blue circle?", "no"))
    assert not reveals("is there a red circle?", Question("colour", "what colour is the circle?", "red"))


def test_every_question_can_be_answered_from_its_scene(task: Task, scenes: list[Scene]) -> None:
    for sample in task.samples:
        scene, answer = scenes[sample.scene], sample.answers[0]
        assert sample.item_map is not None and np.array_equal(sample.item_map, scene.item_map)
        items = [scene.items[i] for i in sample.about]
        if sample.kind == "colour" and answer != "none":
            assert [item.colour for item in items] == [answer]
        if sample.kind == "shape" and answer != "none":
            assert [item.shape for item in items] == [answer]
        if sample.kind == "number" and answer != "none":
            assert [str(item.number) for item in items] == [answer]
        if sample.kind == "count":
            assert len(items) == ("zero", "one", "two", "three").index(answer)
        if sample.kind == "corner":
            assert scene.corner(sample.about[0]) == answer
        words = set(re.findall(r"\w+", sample.question))
        if answer not in ("none", "yes", "no"):
            assert not words & (set(COLOURS) | set(SHAPES)) & set(answer.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "allowed: test, validation, novel"),
        ({"canvas": "round"}, "allowed: square, varied"),
        ({"limit": 0}, "give 1 to 2000"),
        ({"limit": SPLITS["test"] + 1}, "give 1 to 2000"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(trio.InputError, match=message):
        shapesvqa(**options)  # type: ignore[arg-type]  # wrong on purpose
