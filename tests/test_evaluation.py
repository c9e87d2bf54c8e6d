"""The protocol on a trained model: every control is there, a killed run goes on and gives the same, oracles know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trio
from trio import zoo
from trio.core.hooking import patches_on
from trio.core.tokens import ImageTokens
from trio.measure import evaluation
from trio.measure.evaluation import rows as rows_module
from trio.measure.evaluation.answers import AnswerFiles, RowAnswer
from trio.measure.evaluation.floors import Oracle, UniformGridScorer, oracle_order, spread_order
from trio.measure.evaluation.images import Counter, Shown, without_floor
from trio.measure.evaluation.protocol import named_specs, weights
from trio.measure.evaluation.results import EvaluationResults
from trio.measure.evaluation.rows import EvaluationRow, plan
from trio.measure.evaluation.runner import Runner
from trio.measure.evaluation.task import LabelledSample, Task, jsonl, normalise
from trio.spec import PipelineSpec

SPEC = {"name": "ours", "stages": [{"after_layer": 0, "keep": "11.1%"}]}
#: Images as they are.
OWN = EvaluationRow("full", "full", "full")
Loaded = tuple[Any, Any]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def task() -> Task:
    return evaluation.shapesvqa(limit=2)


def run(loaded: Loaded, task: Task, out: Path, specs: list[Any], progress: Any = None) -> EvaluationResults:
    return evaluation.evaluate(*loaded, task, specs, out=out, batch_size=8, speed_rounds=0, progress=progress)


@pytest.fixture(scope="module")
def whole(loaded: Loaded, task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationResults, Path]:
    out = tmp_path_factory.mktemp("whole")
    return run(loaded, task, out, [SPEC]), out


def test_every_control_is_in_the_table(whole: tuple[EvaluationResults, Path], task: Task) -> None:
    results, _ = whole
    label = "after 0: 11.1%"
    names = ["full", "no image", "wrong image", "ours", "none after layer 0"]
    names += [f"{name}, {label}" for name in ("average-pool, equal tokens", "uniform", "random", "oracle")]
    names.append(results.row("ours").equal_cost)
    assert names[-1].startswith("average-pool to ") and names[-1].endswith(f"%, equal cost, {label}")
    assert [row.name for row in results.rows] == names
    assert [row.control for row in results.rows if not row.control] == [""]
    assert results.row(f"random, {label}").draws == [f"random {seed}, {label}" for seed in range(5)]
    average = {row.name: row.average for row in results.rows}
    assert average["full"] == average["no image"] == average["wrong image"] == 144
    assert average["none after layer 0"] == 0
    assert all(average[name] == 16 for name in names[3:4] + names[5:-1])
    accuracy = {row.name: row.accuracy["overall"].mean for row in results.rows}
    assert accuracy["full"] >= accuracy["ours"] > 80 > accuracy["no image"]
    assert accuracy[f"oracle, {label}"] > accuracy[f"random, {label}"]
    assert all(set(row.accuracy) >= {*task.kinds, "overall"} for row in results.rows)
    flops = {row.name: row.flops or 0 for row in results.rows}
    assert flops["full"] > flops["ours"] > flops[f"random, {label}"] > flops["none after layer 0"] > 0
    assert {gate.kind for gate in results.gates} == set(task.kinds)


def test_results_are_written_and_read(whole: tuple[EvaluationResults, Path], tmp_path: Path) -> None:
    results, _ = whole
    (tmp_path / "results.json").write_text(results.to_json())
    assert EvaluationResults.load(tmp_path / "results.json") == results
    lines = results.to_csv().splitlines()
    assert lines[0].startswith("row,control,schedule,kind,questions,accuracy,low,high,retained")
    assert len({line.count(",") for line in lines if '"' not in line}) == 1
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(trio.InputError, match=r"broken\.json.*trio eval"):
        EvaluationResults.load(tmp_path / "broken.json")
    assert results.model["weights"] == weights(zoo.load("tiny-llava")[0])


def test_a_killed_run_goes_on_and_gives_the_same(
    whole: tuple[EvaluationResults, Path], loaded: Loaded, task: Task, tmp_path: Path
) -> None:
    asked = []

    def kill(done: int, total: int) -> None:
        asked.append(done)
        if done >= total // 2:
            raise Killed

    with pytest.raises(Killed):
        run(loaded, task, tmp_path, [SPEC], kill)
    files = sorted((tmp_path / "answers").iterdir())
    for file, change in zip(files, ("whole line", "half line"), strict=False):
        lines = [f"{line}\n" for line in file.read_text().split("\n")[:-1]]
        file.write_text("".join(lines[:-1]) + ("" if change == "whole line" else lines[-1][:10]))
    begun: list[int] = []
    again = run(loaded, task, tmp_path, [SPEC], lambda done, total: begun.append(done))
    assert 0 < begun[0] < max(asked)
    assert again.to_json() == whole[0].to_json()
    for file in sorted((tmp_path / "answers").iterdir()):
        assert file.read_text() == (whole[1] / "answers" / file.name).read_text()


def test_a_finished_folder_takes_more_specs_and_nothing_else(
    whole: tuple[EvaluationResults, Path], loaded: Loaded, task: Task
) -> None:
    results, out = whole
    more = {"name": "theirs", "stages": [{"after_layer": 0, "keep": "11.1%", "selector": "top-k"}]}
    asked: list[tuple[int, int]] = []
    both = run(loaded, task, out, [SPEC, more], lambda done, total: asked.append((done, total)))
    batches = -(-len(task.samples) // 8)
    assert asked[0][1] - asked[0][0] == batches  # only the new row is asked
    assert {key: both.right[key] for key in results.right} == results.right
    assert [one.row for one in both.comparisons if one.row == "theirs"] == ["theirs"]
    changed = {**SPEC, "positions": "compact"}
    asked.clear()
    other = run(loaded, task, out, [changed], lambda done, total: asked.append((done, total)))
    assert asked[0][0] < asked[0][1]  # the same name, but another spec: asked anew
    assert other.right["full"] == results.right["full"]
    with pytest.raises(trio.InputError, match=r"other batch_size.*--out"):
        evaluation.evaluate(*loaded, task, [SPEC], out=out, batch_size=4, speed_rounds=0)


def test_half_a_batch_is_asked_again(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path, {"a": 1})
    answers = [RowAnswer(i, "é", 1, 1.0, None) for i in range(5)]
    files.add("row", "key", answers)
    assert files.read("row", "key", [[0, 1], [2, 3], [4, 5]]) == (answers[:4], 2)
    assert files.read("row", "key", [[0, 1], [2, 3], [4, 5]]) == (answers[:4], 2)  # and the rest is gone
    assert files.read("row", "other key", [[0, 1]]) == ([], 0)
    AnswerFiles(tmp_path, {"a": 1})
    with pytest.raises(trio.InputError, match="other a, b"):
        AnswerFiles(tmp_path, {"a": 2, "b": 1})


def test_specs_have_names_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('version: 1\nstages: [{after_layer: 0, keep: "11.1%"}]\n')
    assert [spec.name for spec in named_specs(["trio-11", file])] == ["trio-11", "mine"]
    with pytest.raises(trio.InputError, match="2 of them are called 'trio-11'"):
        named_specs(["trio-11", "trio-11"])
    with pytest.raises(trio.InputError, match="none was given"):
        named_specs([])


def test_the_baseline_must_be_a_spec(loaded: Loaded, task: Task) -> None:
    with pytest.raises(trio.InputError, match=r"baseline 'x'.*ours"):
        evaluation.evaluate(*loaded, task, [SPEC], baseline="x")


def planned(model: Any, *specs: dict[str, Any], smallest: float = 1.0, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    options = {"several_images": True, "maps": True, "smallest": smallest, **more}
    return plan(model, [PipelineSpec.parse(spec) for spec in specs], 144, **options)


def test_specs_that_differ_in_their_parts_share_controls(loaded: Loaded) -> None:
    other = {"name": "b", "stages": [{"after_layer": 0, "keep": "11.1%", "scorer": "random", "selector": "top-k"}]}
    late = {"name": "late", "stages": [{"after_layer": 2, "keep": 8}]}
    rows, schedules = planned(loaded[0], SPEC, other, late)
    assert list(schedules) == ["after 0: 11.1%", "after 2: 29.2%"]
    assert [row.name for row in rows if row.control == "none"] == ["none after layer 0", "none after layer 2"]
    assert sum(row.control == "oracle" for row in rows) == 2


def test_controls_are_shared_up_to_a_token_where_that_holds_for_every_image(loaded: Loaded) -> None:
    def one(name: str, keep: Any, **fields: Any) -> dict[str, Any]:
        return {"name": name, "stages": [{"after_layer": 0, "keep": keep}], **fields}

    near, count = one("a token more", "11.8%"), one("as many here, not in larger images", 17)
    two_more, renumbered = one("two more", "12.5%"), one("renumbered", "11.1%", positions="compact")
    _, schedules = planned(loaded[0], SPEC, near, count, two_more, renumbered)
    assert list(schedules) == ["after 0: 11.1%", "after 0: 11.8%", "after 0: 12.5%", "after 0: 11.1% #2"]


def test_compressors_get_floors_that_drop_before_the_first_layer(loaded: Loaded) -> None:
    alone = {"name": "a", "compressor": {"name": "visionzip", "keep": 16}}
    both = {
        "name": "b",
        "compressor": {"name": "visionzip", "keep": 32},
        "stages": [{"after_layer": 0, "keep": {"share": "50%", "of": "current"}}, {"after_layer": 4, "keep": 8}],
    }
    decides = {"name": "c", "compressor": {"name": "prumerge"}}
    _, schedules = planned(loaded[0], alone, both, decides, entered={"c": 20.0})
    assert [round(one.average, 1) for one in schedules.values()] == [16.0, 12.0, 20.0]
    assert [one.spec.compressor for one in schedules.values()] == [None] * 3


def test_where_no_schedule_is_near_11_percent_the_gate_gets_a_random_row_of_its_own(loaded: Loaded) -> None:
    rows, schedules = planned(loaded[0], {"name": "half", "stages": [{"after_layer": 3, "keep": "50%"}]})
    assert list(schedules) == ["after 3: 68.8%", "after 3: 11.1% there"]
    assert {row.control for row in rows if row.schedule == "after 3: 11.1% there"} == {"random"}


def test_what_cannot_be_had_says_why(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = planned(loaded[0], SPEC, maps=False, several_images=False)
    refused = {row.control: row.refused for row in rows if row.refused}
    assert refused == {
        "wrong image": "there is only one image",
        "oracle": "the task does not say where in the images things are",
    }
    small = [row for row in planned(loaded[0], SPEC, smallest=0.05)[0] if row.control == "equal tokens"]
    assert [(row.image, row.spec) for row in small] == [("small", None)]
    build = rows_module.Pipeline.from_spec

    def no_pooling(spec: Any, model: Any) -> Any:
        if getattr(spec, "compressor", None) is not None:
            raise trio.UnsupportedModelError("no encoder side")
        return build(spec, model)

    monkeypatch.setattr(rows_module.Pipeline, "from_spec", no_pooling)
    (lower,) = [row for row in planned(loaded[0], SPEC)[0] if row.control == "equal tokens"]
    assert "no image gives this model so few tokens" in lower.refused and "no encoder side" in lower.refused


def test_the_oracle_keeps_the_things_asked_about(loaded: Loaded, task: Task) -> None:
    model, processor = loaded
    runner = Runner(model, processor, task, 4)
    samples = [sample for sample in task.samples if sample.kind in ("corner", "relation", "number")][:4]
    spec = PipelineSpec.parse({"stages": [{"after_layer": 0, "keep": 24, "scorer": Oracle(), "selector": "top-k"}]})
    pipeline = trio.Pipeline.from_spec(spec, model)
    inputs = runner.inputs([([s.load()], s.question) for s in samples], OWN)
    runner.generate(inputs, samples, pipeline, 1)
    for sample, report in zip(samples, pipeline.report.samples, strict=True):
        assert sample.item_map is not None
        kept = set(report.stages[0].groups[0].indices)
        cells = sample.item_map.reshape(12, 14, 12, 14)
        for thing in sample.about:
            share = (cells == thing + 1).mean((1, 3)).reshape(-1)
            assert set(np.nonzero(share > 0.5)[0]) <= kept
        assert len(kept) == 24
    with pytest.raises(trio.InputError, match=r"1 prompts and 4 questions.*show"), pipeline:
        model(**runner.inputs([([samples[0].load()], "?")], OWN))


def test_the_uniform_floor_spreads_and_nests(loaded: Loaded, task: Task) -> None:
    runner = Runner(*loaded, task, 1)
    sample = task.samples[0]
    inputs = runner.inputs([([sample.load()], sample.question)], OWN)
    kept = {}
    for keep in (4, 16, 64):
        stage = trio.Stage(after_layer=0, keep=keep, scorer=UniformGridScorer(), selector="top-k")
        pipeline = trio.Pipeline(loaded[0], stages=[stage])
        runner.generate(inputs, [sample], pipeline, 1)
        kept[keep] = pipeline.report.samples[0].stages[0].groups[0].indices
    assert set(kept[4]) < set(kept[16]) < set(kept[64])
    for keep, quarter in ((4, 1), (16, 2)):  # every quarter of the image has its share, give or take the axes
        places = np.array([(i // 12 // 6, i % 12 // 6) for i in kept[keep]])
        counts = np.bincount(places[:, 0] * 2 + places[:, 1], minlength=4)
        assert counts.min() >= quarter
    far = np.array([[(a // 12 - b // 12) ** 2 + (a % 12 - b % 12) ** 2 for a in kept[16]] for b in kept[16]])
    assert np.sqrt(far[far > 0].min()) >= 2


def test_oracles_of_tiled_images_find_a_thing_in_every_frame() -> None:
    image = ImageTokens.join([ImageTokens.from_grid(4, 4), ImageTokens.from_grid(8, 8)])
    item_map = np.zeros((80, 80), np.uint8)
    item_map[40:60, 0:20] = 1
    item_map[0:10, 70:80] = 2
    ranks = np.array(oracle_order(image, item_map, (0, 1)))
    assert sorted(ranks) == list(range(80))
    first = np.argsort(ranks)[:7]
    places = {(int(image.frame[i]), int(image.row[i]), int(image.column[i])) for i in first}
    assert places == {(0, 2, 0), (1, 4, 0), (1, 4, 1), (1, 5, 0), (1, 5, 1), (0, 0, 3), (1, 0, 7)}
    assert oracle_order(image, item_map, ()) == list(spread_order(image))


class Patches(Counter):
    """One token for every 28 x 28 pixels, as Qwen counts."""

    def __init__(self) -> None:
        """Needs no model."""

    def of_size(self, size: tuple[int, int]) -> int:
        return max(1, round(size[0] / 28)) * max(1, round(size[1] / 28))


@pytest.mark.parametrize(("size", "wanted"), [((336, 336), 16), ((560, 280), 22), ((300, 100), 5)])
def test_smaller_images_have_the_tokens_asked_for(size: tuple[int, int], wanted: int) -> None:
    counter = Patches()
    found = counter.size_for(size, wanted)
    assert counter.smallest(size) == 1
    assert abs(counter.of_size(found) - wanted) <= 3
    assert found[0] / found[1] == pytest.approx(size[0] / size[1], rel=0.1)


def test_each_row_sees_its_image(task: Task) -> None:
    shown = Shown(task, Patches(), Patches())
    sample, other = task.samples[0], task.samples[-1]
    assert shown.image(sample, "own", 0).tobytes() == sample.load().tobytes()
    assert shown.image(sample, "wrong", 0).tobytes() == other.load().tobytes() != sample.load().tobytes()
    blank = shown.image(sample, "blank", 0)
    assert blank.size == sample.load().size and blank.getcolors() == [(168 * 168, (128, 128, 128))]
    small = shown.image(sample, "small", 4 / 36)
    assert Patches().of_size(small.size) == 4


def test_a_processor_without_its_floor(loaded: Loaded) -> None:
    from lab.training.families import FAMILIES

    assert without_floor(loaded[1]) is loaded[1]  # images of one size
    family = FAMILIES["tiny-qwen2.5-vl"]
    processor = family.processor(family.recipe, family.tokenizer())
    free = without_floor(processor)
    image = Image.new("RGB", (28, 56))
    few, many = (
        int(one.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].prod())
        for one in (free, processor)
    )
    assert 4 * few < many
    assert processor.image_processor.size["shortest_edge"] > free.image_processor.size["shortest_edge"]


def test_images_encoded_once_change_no_answer(loaded: Loaded, task: Task, tmp_path: Path) -> None:
    runner = Runner(*loaded, task, 8)
    rows = [row for row in planned(loaded[0], SPEC)[0] if row.name in ("full", "ours")]
    found = runner.run(rows, AnswerFiles(tmp_path, {}))
    for row in rows:
        pipeline = runner.pipeline(row) if row.spec is not None else None
        for batch in runner.batches:
            samples = [task.samples[i] for i in batch]
            inputs = runner.inputs([([s.load()], s.question) for s in samples], OWN)
            out = runner.generate(inputs, samples, pipeline, task.max_new_tokens)
            texts = [text.strip() for text in loaded[1].batch_decode(out, skip_special_tokens=True)]
            assert [found[row.name][i].text for i in batch] == texts
    assert found["full"] != found["ours"]
    assert not list(patches_on(runner.model))
    assert runner.memory.encoded == len(runner.batches)  # for two rows


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The  Red.", "red"),
        ("'two'", "two"),
        ("3,000.5", "3,000.5"),
        ("a", "a"),
        ("Yes, it is!", "yes it is"),
        ("t-shirt", "t-shirt"),
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(answer: str, same: str) -> None:
    assert normalise(answer) == same
    assert LabelledSample(Image.new("RGB", (1, 1)), "?", (same,)).is_right(answer)
    assert not LabelledSample(Image.new("RGB", (1, 1)), "?", ("other",)).is_right(answer)


def test_questions_from_a_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    rows = [
        {"image": "a.png", "question": "what?", "answer": "red"},
        {"image": "b.png", "question": "where?", "answer": ["left", "on the left"], "kind": "place"},
        {"image": "a.png", "question": "who?", "answer": "nobody"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    task = jsonl(file)
    assert [(s.kind, s.scene) for s in task.samples] == [("all", 0), ("place", 1), ("all", 0)]
    assert task.samples[1].is_right("Left") and task.samples[1].load().size == (20, 10)
    assert task.kinds == ["all", "place"] and task.scenes == 2
    assert len(jsonl(file, limit=1).samples) == 1
    assert jsonl(file).fingerprint() == task.fingerprint() != jsonl(file, limit=2).fingerprint()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"questions\.jsonl', line 1: no JSON"),
        ('{"image": "a.png", "question": "?"}', r"line 1: 'answer' is missing; a line is"),
        ('["a"]', r"line 1: found list"),
        ('{"image": "a.png", "question": "?", "answer": []}', r"line 1: 'answer': found \[\]"),
        ('{"image": "a.png", "question": " ", "answer": "x"}', r"line 1: 'question': found ' '"),
        ('{"image": "a.png", "question": "?", "answer": "x", "kind": "overall"}', r"line 1: .*the name 'overall'"),
        ('{"image": "none.png", "question": "?", "answer": "x"}', r"line 1: there is no image .*none\.png"),
        ("", r"is empty; write one JSON object"),
    ],
)
def test_files_with_mistakes_are_refused(line: str, message: str, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    file = tmp_path / "questions.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(trio.InputError, match=message):
        jsonl(file)
    with pytest.raises(trio.InputError, match="cannot be read"):
        jsonl(tmp_path / "missing.jsonl")
