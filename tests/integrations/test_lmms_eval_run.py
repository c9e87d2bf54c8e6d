"""lmms-eval itself runs `--model trio` on a small local task, offline. Runs where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import pytest
from lmms_eval import evaluator
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

import trio
from benchmarks import paper
from benchmarks.expected import HERE, Source, measured, spec_of
from benchmarks.expected.tables import PaperRow, PaperTable
from lab.training.evaluate import answers
from trio import zoo
from trio.measure.shapesvqa.examples import Example, examples

SCENES, SPEC = 6, "trio-11"


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    return examples("test", 0, SCENES)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, asked: list[Example]) -> Path:
    folder = tmp_path_factory.mktemp("task")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    for file in (Path(__file__).parent / "task").iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    docs = []
    for example in asked:
        example.image.save(folder / f"{example.scene}.png")
        docs.append({"images": [f"{example.scene}.png"], "question": example.question, "answer": example.answer})
    (folder / "scenes.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    several = [doc | {"images": [f"{n}.png" for n in range(number % 3)]} for number, doc in enumerate(docs[:9])]
    (folder / "several.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in several))
    return folder


def evaluate(task: Path, batch_size: int, spec: str) -> dict[str, Any]:
    """What lmms-eval finds."""
    return evaluator.simple_evaluate(
        model="trio",
        model_args=f"pretrained=tiny-llava,spec={spec},dtype=float32,device=cpu",
        tasks=["trio_scenes", "trio_several"],
        batch_size=batch_size,
        task_manager=TaskManager("ERROR", include_path=str(task), model_name="trio"),
        bootstrap_iters=0,
    )


def said(results: dict[str, Any], name: str = "trio_scenes") -> list[str]:
    """The answers in the order of the questions."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


@pytest.fixture(scope="module")
def runs(task: Path) -> dict[tuple[int, str], dict[str, Any]]:
    return {(size, spec): evaluate(task, size, spec) for size in (1, 4) for spec in ("none", SPEC)}


def test_the_entry_point() -> None:
    assert get_model_manifest("trio").model_id == "trio"
    assert get_model("trio").__module__ == "trio.integrations.lmms_eval.model"
    assert not get_model("trio", force_simple=True).is_simple  # there is no simple model to fall back to


@pytest.mark.parametrize("spec", ["none", SPEC])
@pytest.mark.parametrize("name", ["trio_scenes", "trio_several"])
def test_batches_answer_as_singles_do(runs: dict[tuple[int, str], dict[str, Any]], spec: str, name: str) -> None:
    one, four = runs[1, spec], runs[4, spec]
    assert said(one, name) == said(four, name)
    assert one["results"][name] == four["results"][name]


@pytest.mark.parametrize("spec", ["none", SPEC])
def test_answers_are_those_of_generate(
    runs: dict[tuple[int, str], dict[str, Any]], asked: list[Example], spec: str
) -> None:
    model, processor = zoo.load("tiny-llava", dtype="float32")
    pipeline = None if spec == "none" else trio.Pipeline.from_spec(spec, model)
    expected = [text.strip() for text in answers(model, processor, asked, context=pipeline)]
    found = [text.strip() for text in said(runs[4, spec])]
    assert found == expected
    right = sum(text == example.answer for text, example in zip(expected, asked, strict=True))
    assert runs[4, spec]["results"]["trio_scenes"]["exact_match,none"] == pytest.approx(right / len(asked))


def test_the_spec_changes_something(runs: dict[tuple[int, str], dict[str, Any]]) -> None:
    full, compressed = runs[4, "none"], runs[4, SPEC]
    assert said(full) != said(compressed)
    assert full["results"]["trio_scenes"]["exact_match,none"] >= 0.8


def test_the_stop_string_ends_answers(runs: dict[tuple[int, str], dict[str, Any]]) -> None:
    found = said(runs[4, "none"], "trio_several")
    assert not any("e" in text for text in found)
    whole = [text for text, number in zip(said(runs[4, "none"])[:9], range(9), strict=True) if number % 3 == 1]
    assert any("e" in text for text in whole)  # so that there was something to cut off


def test_retention_is_in_the_results(runs: dict[tuple[int, str], dict[str, Any]], asked: list[Example]) -> None:
    model, processor = zoo.load("tiny-llava", dtype="float32")
    pipeline = trio.Pipeline.from_spec(SPEC, model)
    answers(model, processor, asked[:2], context=pipeline)
    assert 0 < pipeline.report.retention < 0.2
    found = runs[4, SPEC]["throughput"]
    assert found["avg_retention_trio_scenes"] == pytest.approx(pipeline.report.retention)  # all images of one size
    assert found["avg_retention"] == pytest.approx(pipeline.report.retention)
    assert "avg_retention" not in runs[4, "none"]["throughput"]


@pytest.fixture(scope="module")
def results_file(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    out = tmp_path_factory.mktemp("results")
    command = f"-m lmms_eval --model trio --model_args pretrained=tiny-llava,spec={SPEC},dtype=float32,device=cpu"
    options = ["--tasks", "trio_scenes", "--batch_size", "4", "--include_path", str(task), "--output_path", str(out)]
    done = subprocess.run([sys.executable, *command.split(), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "visual tokens kept on average" in done.stdout + done.stderr
    (file,) = out.rglob("*_results.json")
    return file


def test_the_command_line(results_file: Path, runs: dict[tuple[int, str], dict[str, Any]]) -> None:
    found = json.loads(results_file.read_text())
    expected = runs[4, SPEC]["results"]["trio_scenes"]["exact_match,none"]
    assert found["results"]["trio_scenes"]["exact_match,none"] == pytest.approx(expected)
    assert 0 < found["throughput"]["avg_retention"] < 0.2


def test_the_ocr_task_shows_the_words() -> None:
    config = load_yaml_config(str(HERE / "tasks" / "textvqa_val_ocr.yaml"))
    doc = {"question": "what is written?", "ocr_tokens": ["STOP", "now"], "answers": ["stop"] * 10, "question_id": 1}
    text = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert text == (
        "What is written?\nReference OCR token: STOP, now\nAnswer the question using a single word or phrase."
    )
    assert config["process_results"](doc, ["stop"])["exact_match"] == 1.0
    assert {metric["metric"] for metric in config["metric_list"]} == {"exact_match"}


def test_a_results_file_beside_the_table(results_file: Path) -> None:
    """The table has no such task; a file of a real run is read all the same."""
    found = json.loads(results_file.read_text())
    assert spec_of(found) == SPEC
    assert measured(found) == {}
    found["results"]["pope"] = {"pope_f1_score,none": found["results"]["trio_scenes"]["exact_match,none"]}
    assert measured(found)["pope"][0] == pytest.approx(100 * found["results"]["trio_scenes"]["exact_match,none"])


def test_a_row_of_the_paper_s_tables(task: Path, tmp_path: Path) -> None:
    """The command's parts on a local task: run once, read again, scores and costs in the table."""
    source = Source("trio_scenes", ("exact_match",), 100)
    table = PaperTable("zoo", "tiny-llava", {"full": PaperRow("none"), "trio": PaperRow(SPEC)}, ("scenes",))
    found = {}
    for name, row in table.rows.items():
        (job,) = paper.jobs(
            table, row, "tiny-llava", tmp_path / name, sources={"scenes": source}, include=task, batch_size=4
        )
        assert job.results() is None
        assert paper.run(job) == job.results()
        found[name] = paper.done([job])
    config = zoo.load("tiny-llava")[0].config
    shown = paper.report(table, table.rows["trio"], found["trio"], found["full"], config, {"scenes": (source,)})
    columns = {column.header: list(column.cells) for column in shown.columns}
    rows = dict(zip(columns[""], columns["here"], strict=True))
    assert 0 < float(rows["scenes"]) <= 100 and rows["visual tokens kept"].endswith(" of 144.0")
    assert all(rows[what].endswith("x") for what in ("time of an answer", "KV cache", "FLOPs of the whole model"))


def test_what_is_not_done_is_refused() -> None:
    model = get_model("trio").create_from_arg_string("pretrained=tiny-llava,spec=none,device=cpu", {"batch_size": 2})
    assert (model.rank, model.world_size, model.batch_size, str(model.device)) == (0, 1, 2, "cpu")
    with pytest.raises(trio.TrioError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(trio.TrioError, match="rounds"):
        model.generate_until_multi_round([])
    model.clean()
    with pytest.raises(trio.TrioError, match="make a new one"):
        model.generate_until([])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("pretrained=tiny-llava,spec=none,quantize=4", "unknown argument 'quantize'"),
        ("pretrained=tiny-llava", "`spec` is missing"),
        ("pretrained=tiny-llava,spec=no-such-spec", "no-such-spec"),
        ("pretrained=tiny-llava,spec=none,max_pixels=1000", "max_pixels means nothing"),
    ],
)
def test_wrong_arguments(arguments: str, match: str) -> None:
    with pytest.raises(trio.TrioError, match=match):
        get_model("trio").create_from_arg_string(arguments, {"device": "cpu"})
