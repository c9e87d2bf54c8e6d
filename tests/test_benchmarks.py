"""The retention benchmark: resuming, the remembered tower, the floor, the statistics, and the committed page."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trio
from benchmarks import retention
from benchmarks.retention import answered, batches, measure, measured
from benchmarks.rows import PLACEMENTS, Row, key, rows
from benchmarks.statistics import Answers
from benchmarks.table import with_summary, write_table
from trio import zoo
from trio.evaluation.floors import UniformGrid
from trio.zoo.evaluate import answers, examples

DOCS = Path(trio.__file__).parent.parent / "docs"
MODEL = "tiny-llava"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return zoo.load(MODEL)


def test_rows_stand_where_they_say_and_keep_what_they_say(loaded: tuple[Any, Any]) -> None:
    table, refused = rows(loaded[0], 144)
    average = {row.name: row.average for row in table}
    assert len(average) == len(table) == 10 + 9 * 8 + 3
    assert average["input/11.1%/random 0"] == 16
    assert average["trio-11/11.1%/objective-gradient + nms"] == pytest.approx(16, abs=0.5)
    assert average["after-1/11.1%/last-token-attention + top-k"] == pytest.approx((144 + 7 * 16) / 8)
    assert [average[f"none/{depth}"] for depth in range(8)] == [144 * depth / 8 for depth in range(8)]
    places = {name.split("/")[0] for name in refused}
    assert places == {"input", "trio-11"}
    assert all("last-token-attention" in name and "after_layer is 0" in why for name, why in refused.items())


def test_the_remembered_tower_changes_no_answer(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    asked = examples("test", 7, 3)
    made = batches(processor, asked, 8)
    stage = trio.Stage(after_layer=0, keep="11.1%")
    for pipeline in (None, trio.Pipeline(model, stages=[stage])):
        plain = answers(model, processor, asked, 8, pipeline)
        expected = "".join("01"[text == e.answer] for text, e in zip(plain, asked, strict=True))
        row = Row("one", 0.0, pipeline)
        assert answered(model, processor, row, made) == expected
    assert "forward" not in vars(model.model.vision_tower)


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("full", "blank", "none/0", key(PLACEMENTS[0], "11.1%", "random 3"))

    def some(model: Any, tokens: int) -> tuple[list[Row], dict[str, str]]:
        table, refused = rows(model, tokens)
        return [row for row in table if row.name in few], refused

    monkeypatch.setattr(retention, "rows", some)
    monkeypatch.setattr(retention, "CHUNK", 2)
    folder = zoo.path(MODEL)
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    measure(MODEL, folder, whole, 5)
    measure(MODEL, folder, killed, 5, limit=1)
    assert json.loads(killed.read_text())["scenes"] == 2
    measure(MODEL, folder, killed, 5)
    first, second = ({**json.loads(file.read_text()), "seconds": 0} for file in (whole, killed))
    assert first == second
    assert first["scenes"] == 5
    questions = len(examples("test", retention.SEED, 5))
    assert {row: len(text) for row, text in first["right"].items()} == dict.fromkeys(few, questions)
    with pytest.raises(trio.InputError, match=r"other seed.*--out"):
        measure(MODEL, folder, killed, 6, seed=1)


def test_the_uniform_floor_spreads_and_nests(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    (example, *_) = examples("test", 7, 1)
    inputs = batches(processor, [example], 1)[0].inputs
    kept = {}
    for keep in (4, 16, 64):
        stage = trio.Stage(after_layer=0, keep=keep, scorer=UniformGrid(), selector="top-k")
        pipeline = trio.Pipeline(model, stages=[stage])
        with pipeline:
            model(**inputs)
        kept[keep] = pipeline.report.samples[0].stages[0].groups[0].indices
    assert set(kept[4]) < set(kept[16]) < set(kept[64])
    for keep, quarter in ((4, 1), (16, 2)):  # every quarter of the picture has its share, give or take the axes
        places = np.array([(i // 12 // 6, i % 12 // 6) for i in kept[keep]])
        counts = np.bincount(places[:, 0] * 2 + places[:, 1], minlength=4)
        assert counts.min() >= quarter
    far = np.array([[(a // 12 - b // 12) ** 2 + (a % 12 - b % 12) ** 2 for a in kept[16]] for b in kept[16]])
    assert np.sqrt(far[far > 0].min()) >= 2


def results(right: dict[str, str], scenes: list[int], kinds: list[str]) -> Answers:
    return Answers({"questions": {"scene": scenes, "kind": kinds}, "right": right})


def test_differences_are_paired_and_clustered() -> None:
    scenes = [scene for scene in range(40) for _ in range(4)]
    kinds = ["a", "b", "c", "d"] * 40
    same = "1100" * 40
    every_other_scene = ("1111" + "0000") * 20
    right = "1" * 160
    random = {f"x/random {seed}": "1" * 160 if seed == 0 else "0" * 160 for seed in range(5)}
    found = results({"right": right, "same": same, "scenes": every_other_scene, **random}, scenes, kinds)
    zero = found.difference("same", "same")
    assert (zero.mean, zero.low, zero.high, zero.verdict) == (0, 0, 0, "not told apart")
    alike = found.accuracy("same")
    assert alike.low == alike.high == 50  # the same in every scene
    assert found.accuracy("same", "a").low == pytest.approx(100 * 40 / (40 + 1.96**2), abs=0.01)  # Wilson, all right
    assert found.accuracy("right").low == pytest.approx(100 * 40 / (40 + 1.96**2), abs=0.01)
    clustered = found.accuracy("scenes")
    assert clustered.mean == 50
    assert (clustered.high - clustered.low) / 2 == pytest.approx(
        100 * 1.96 * 0.5 / np.sqrt(40), rel=0.15
    )  # 40 scenes, not 160 questions
    assert found.accuracy("x/random").mean == pytest.approx(20)
    assert found.spread("x/random") == (0, 100)
    assert found.difference("same", "x/random", "a").mean == pytest.approx(80)
    assert found.difference("same", "x/random", "a").verdict == "above"
    assert found.difference("same", "x/random", "c").verdict == "below"


def test_the_page_is_made_from_the_committed_results(tmp_path: Path) -> None:
    files = measured()
    assert MODEL in [file["model"] for file in files]
    for file in files:  # measured on the weights that are shipped
        weights = (zoo.path(file["model"]) / "model.safetensors").read_bytes()
        assert file["weights"] == hashlib.sha256(weights).hexdigest()
    write_table(files, tmp_path / "retention.md")
    assert (tmp_path / "retention.md").read_text() == (DOCS / "retention.md").read_text()
    readme = (DOCS.parent / "README.md").read_text()
    assert with_summary(readme, files[0]) == readme
