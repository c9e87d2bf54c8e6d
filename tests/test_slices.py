"""Slices where dropping tokens hurts: that the truth is true, by what is drawn, and that no answer is given away."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from trio.cli import app
from trio.errors import InputError
from trio.measure.evaluation.results import EvaluationResults
from trio.measure.shapesvqa.scenes import COLOURS, Scene
from trio.measure.shapesvqa.slices import (
    NUMBERS,
    SLICES,
    TASKS,
    SliceName,
    named_right,
    slice_samples,
    slice_task,
)
from trio.measure.shapesvqa.task import CANVASES, Canvas, reveals

every_canvas = pytest.mark.parametrize("canvas", CANVASES)


def things(scene: Scene) -> list[tuple[str, str]]:
    """Colour and shape of what is drawn: items that have pixels in the map."""
    seen = set(np.unique(scene.item_map).tolist()) - {0}
    assert seen == set(range(1, len(scene.items) + 1))  # nothing is hidden
    return [(item.colour, item.shape) for item in scene.items]


def nearest_colour(scene: Scene, index: int) -> str:
    """The colour's name by the pixels in the middle of a thing."""
    pixels = np.asarray(scene.image)[scene.item_map == index + 1].astype(float)
    middle = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - middle).sum()))


@pytest.mark.parametrize("name", SLICES)
@every_canvas
def test_a_smaller_slice_is_the_beginning_of_a_larger_one(name: SliceName, canvas: Canvas) -> None:
    few, more = (slice_samples(name, count, canvas=canvas) for count in (3, 6))
    for one, other in zip(few, more, strict=False):
        assert one.turns == other.turns and one.number == other.number
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
    assert [one.number for one in more] == list(range(6))
    fresh = slice_samples(name, 3, canvas=canvas, seed=5)
    assert [one.turns for one in fresh] != [one.turns for one in few]


@every_canvas
def test_descriptions_name_every_thing_at_its_place(canvas: Canvas) -> None:
    for sample in slice_samples("describe", 12, canvas=canvas):
        (scene,), (turn,) = sample.scenes, sample.turns
        words = re.findall(r"(\w+) (\w+) r(\d+) c(\d+)", turn.answers[0])
        assert sorted((colour, shape) for colour, shape, _, _ in words) == sorted(
            (item.colour, item.shape) for item in scene.items if item.shape != "plate"
        )
        places = [(int(row), int(column)) for *_, row, column in words]
        assert places == sorted(places)  # reading order
        for colour, shape, row, column in words:
            patch = scene.item_map[14 * int(row) : 14 * int(row) + 14, 14 * int(column) : 14 * int(column) + 14]
            there = {(scene.items[i - 1].colour, scene.items[i - 1].shape) for i in np.unique(patch).tolist() if i}
            assert (colour, shape) in there


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("red circle r1 c2 blue star r3 c4", 1.0),
        ("Blue star r9 c9, red circle", 1.0),  # places and order do not count here
        ("red circle r1 c2", 0.5),
        ("red circle blue star blue star green cross", 0.5),  # what is not there counts against it
        ("red star blue circle", 0.0),
        ("", 0.0),
    ],
)
def test_share_of_objects(answer: str, share: float) -> None:
    assert named_right(answer, "red circle r1 c2 blue star r3 c4") == share
    assert named_right("black plate 42 r1 c1", "black plate 42 r0 c0") == 1.0
    assert named_right("black plate 43 r1 c1", "black plate 42 r0 c0") == 0.0


@every_canvas
def test_second_questions_are_about_other_things(canvas: Canvas) -> None:
    samples = slice_samples("second-question", 24, canvas=canvas)
    for sample in samples:
        (scene,), (one, two) = sample.scenes, sample.turns
        assert one.about and two.about and not set(one.about) & set(two.about)
        boxes = [[scene.items[i].box for i in turn.about] for turn in (one, two)]
        for (a, b, c, d), (e, f, g, h) in itertools.product(*boxes):
            assert c <= e or g <= a or d <= f or h <= b  # they do not overlap
        for asked, other in ((one, two), (two, one)):
            question: Any = type("Asked", (), {"kind": asked.kind, "text": asked.question, "answer": asked.answers[0]})
            assert not reveals(other.question, question)
        for turn in (one, two):
            first = scene.items[turn.about[0]]
            if turn.kind == "colour":
                assert turn.answers == (first.colour,) == (nearest_colour(scene, turn.about[0]),)
                assert [item.shape for item in scene.items].count(first.shape) == 1
            elif turn.kind == "shape":
                assert turn.answers == (first.shape,)
            elif turn.kind == "number":
                assert turn.answers == (str(first.number),)
    kinds = Counter(sample.turns[1].kind for sample in samples)
    assert max(kinds.values()) - min(kinds.values()) <= 4 and len(kinds) >= 4


@every_canvas
def test_counting_goes_from_zero_to_nine(canvas: Canvas) -> None:
    samples = slice_samples("counting", 40, canvas=canvas)
    found: Counter[int] = Counter()
    for sample in samples:
        (scene,), (turn,) = sample.scenes, sample.turns
        asked = re.fullmatch(r"how many (\w+?)(?:es)?s? are there\?", turn.question)
        assert asked is not None
        there = [shape for _, shape in things(scene) if shape in (asked[1], f"{asked[1]}s", f"{asked[1]}e")]
        assert 6 <= len(scene.items) <= 9 and len(there) == len(turn.about)
        assert turn.answers == (NUMBERS[len(there)], str(len(there)))
        assert len({item.cell for item in scene.items}) == len(scene.items)
        for i in range(len(scene.items)):
            assert nearest_colour(scene, i) == scene.items[i].colour
        found[len(there)] += 1
    assert found == dict.fromkeys(range(10), 4)


@every_canvas
def test_one_of_two_images_has_what_is_asked_for(canvas: Canvas) -> None:
    samples = slice_samples("two-images", 20, canvas=canvas)
    for sample in samples:
        first, second = sample.scenes
        (turn,) = sample.turns
        assert first.image.tobytes() != second.image.tobytes()
        *_, colour, shape = turn.question.rstrip("?").split()
        has = [(colour, shape) in things(scene) for scene in (first, second)]
        assert has.count(True) == 1
        assert turn.answers[0] == ("first", "second")[has.index(True)]
        assert turn.is_right(f"The {turn.answers[0]} image.") and not turn.is_right("neither")
    assert Counter(one.turns[0].answers[0] for one in samples) == {"first": 10, "second": 10}
    near = [
        any(c == colour for c, _ in things(other)) and any(s == shape for _, s in things(other))
        for sample in samples
        for *_, colour, shape in [sample.turns[0].question.rstrip("?").split()]
        for other in [sample.scenes[sample.turns[0].answers[0] == "first"]]
    ]
    assert sum(near) >= 10  # the other image mostly has the colour and the shape apart


@pytest.mark.parametrize("name", TASKS)
def test_tasks_ask_what_the_slices_ask(name: SliceName) -> None:
    task, samples = slice_task(name, 5), slice_samples(name, 5)
    assert [one.question for one in task.samples] == [one.turns[0].question for one in samples]
    assert task.facts["slice"] == name and task.scenes == 5
    for labelled, one in zip(task.samples, samples, strict=True):
        assert labelled.is_right(one.turns[0].answers[0]) and labelled.about == one.turns[0].about
    assert task.fingerprint() != slice_task(name, 5, seed=1).fingerprint()


def test_what_is_wrong_is_said() -> None:
    for given, message in (
        (("described", 3), "slice 'described' is unknown; allowed: describe, second-question"),
        (("describe", 0), "found 0 samples"),
    ):
        with pytest.raises(InputError, match=message):
            slice_samples(*given)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match=r"two turns or two images.*benchmarks\.slices"):
        slice_task("two-images", 3)
    with pytest.raises(InputError, match="canvas 'round' is unknown"):
        slice_samples("describe", 3, canvas="round")  # type: ignore[arg-type]  # wrong on purpose


def test_trio_eval_asks_a_slice(tmp_path: Path) -> None:
    options = [
        "--slice",
        "describe",
        "--limit",
        "2",
        "--speed-rounds",
        "0",
        "--no-html",
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, ["eval", *options])
    assert result.exit_code == 0, result.stderr
    found = EvaluationResults.load(tmp_path / "run" / "results.json")
    assert found.task["slice"] == "describe" and found.task["questions"] == 2 and found.kinds == ["describe"]
    data = tmp_path / "x.jsonl"
    refused = CliRunner().invoke(
        app, ["eval", "--task", "jsonl", "--data", str(data), "--slice", "counting", "--out", str(tmp_path / "other")]
    )
    assert refused.exit_code == 2 and "slice: it is of the task shapesvqa, not of jsonl" in refused.stderr


def test_the_page_shows_the_committed_results() -> None:
    from benchmarks.slices import PAGE, block, measured

    found = measured()
    assert [one["model"] for one in found] == ["tiny-llava", "tiny-qwen2.5-vl"]
    page = PAGE.read_text(encoding="utf-8")
    assert block() in page
    for one in found:
        assert set(one["slices"]) == set(SLICES)
        for name, part in one["slices"].items():
            gate = part["gate"]
            asked = {"describe": "objects", "second-question": "on the kept cache"}.get(name, "right")
            assert gate["passed"] == (gate["full"] >= 90 and gate["full"] - gate["no image"] >= 30)
            assert part["rows"][0]["name"] == "full" and gate["full"] == pytest.approx(
                part["rows"][0]["scores"][asked]["mean"], abs=0.01
            )


def test_second_turns_go_on_with_the_kept_cache(tmp_path: Path) -> None:
    """Against one pass over the whole conversation that replays what the first question kept."""
    import torch

    import trio
    from benchmarks.slices import SliceAsker
    from trio.core.images import batch_for, prompt_for
    from trio.testing.bench import extended

    asker = SliceAsker("tiny-llava", tmp_path)
    spec = {"version": 1, "stages": [{"after_layer": 1, "keep": "20%"}]}
    samples = slice_samples("second-question", 2)
    answers = asker.second_turns(samples, spec)
    pipeline = trio.Pipeline.from_spec(spec, asker.model)
    tokenizer = asker.processor.tokenizer
    for sample, answer in zip(samples, answers, strict=True):
        inputs = batch_for(asker.processor, [(sample.images, sample.turns[0].question)])
        with torch.no_grad(), pipeline:
            first = asker.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        kept = pipeline.report.selection()
        text = prompt_for(asker.processor, 0, sample.turns[1].question)
        ids = torch.cat([first, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids], 1)
        said: list[int] = []
        while len(said) < 6 and tokenizer.eos_token_id not in said:
            whole = extended(inputs, torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1))
            with pipeline.replay(kept), torch.no_grad():
                said.append(int(asker.model(**whole).logits[0, -1].argmax()))
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer
