"""`trio batch` and the class for Ray, without Ray: every row comes out once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tables import BAD, write_table
from typer.testing import CliRunner, Result

import trio
from trio import zoo
from trio.batch import BatchRow, LocalEngine, RowAnswerer, RowOutput, RowSource, Shards, open_rows, run_job
from trio.batch.answerer import PreparedRows
from trio.batch.rows import ParquetRows
from trio.cli import app
from trio.integrations.ray import RayAnswerer
from trio.integrations.ray.answerer import results_of
from trio.integrations.ray.cluster import check_room
from trio.integrations.vllm import jobs

ROWS = 22
SETTINGS = {"model": "m"}
ALONE = "version: 1\nname: alone\ncompressor: {name: divprune, keep: 16}\npositions: compact\n"


def batch(*given: str | Path) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, given)])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("rows")
    return folder / "rows.jsonl", write_table(folder, ROWS)


@pytest.fixture(scope="module")
def answers(table: tuple[Path, list[dict[str, Any]]]) -> list[str | None]:
    """By single questions, with transformers alone and the public pipeline."""
    file, rows = table
    model, processor = zoo.load("tiny-llava")
    found: list[str | None] = []
    with trio.Pipeline.from_spec("trio-soft-11", model), torch.no_grad():
        for number, row in enumerate(rows):
            if number == BAD:
                found.append(None)
                continue
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            image = Image.open(file.parent / row["image"])
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            found.append(processor.decode(new, skip_special_tokens=True).strip())
    return found


def written(out: Path) -> list[dict[str, Any]]:
    parts = sorted(out.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


class Recorded:
    """An engine that notes what it is asked, and stops where it is told to."""

    def __init__(self, stop: int | None = None, twice: bool = False, leave: bool = False) -> None:
        self.asked: list[str] = []
        self.stop, self.twice, self.leave = stop, twice, leave

    def answers(self, source: RowSource, done: Set[str]) -> Generator[RowOutput, None, None]:
        for row in [one for one in source.rows() if one.id not in done][1 if self.leave else 0 :]:
            if len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append(row.id)
            yield RowOutput(row.id, "yes", right=True)
            if self.twice:
                yield RowOutput(row.id, "yes", right=True)


# The command ---------------------------------------------------------------------------------------------------------


def test_every_row_comes_out_once_and_a_bad_image_is_a_row(
    table: tuple[Path, list[dict[str, Any]]], answers: list[str | None], tmp_path: Path
) -> None:
    file, rows = table
    out = tmp_path / "out"
    given = ("--input", file, "--out", out, "--max-new-tokens", 8, "--batch-size", 5, "--shard-rows", 8)
    result = batch(*given, "--json")
    assert result.exit_code == 0, result.output
    lines = written(out)
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["answer"] for line in lines] == answers
    assert [line["right"] for line in lines] == [
        number != BAD and answers[number] == row["answer"] for number, row in enumerate(rows)
    ]
    assert lines[BAD]["error"].startswith("image") and "bad.png" in lines[BAD]["error"]
    good = [line for line in lines if line["error"] is None]
    assert len(good) == ROWS - 1 and {line["visual_tokens"] for line in good} == {144}
    assert all(line["kept"] == pytest.approx(16, abs=0.5) and line["new_tokens"] >= 2 for line in good)
    assert len(list(out.glob("part-*.jsonl"))) == 3 and not list(out.glob("*.partial"))
    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["rows"] == ROWS and summary["errors"] == 1 and list(summary["examples"]) == [f"row-{BAD}"]
    right = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True))
    assert summary["accuracy"] == right / ROWS > 0.8

    before = {part: part.read_bytes() for part in out.glob("part-*")}
    again = batch(*given)
    assert again.exit_code == 0 and f"rows: {ROWS}, answered {ROWS - 1}, errors 1" in again.stdout
    assert {part: part.read_bytes() for part in out.glob("part-*")} == before


def test_the_class_for_ray_gives_the_same(table: tuple[Path, list[dict[str, Any]]], answers: list[str | None]) -> None:
    file, rows = table
    answerer = RayAnswerer("tiny-llava", "trio-soft-11", max_new_tokens=8, folder=file.parent)
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in ("id", "question", "answer")}
    columns["image"] = np.array(
        [(file.parent / row["image"]).read_bytes() if n % 2 else row["image"] for n, row in enumerate(rows)], object
    )
    columns["image"][2] = {"bytes": (file.parent / rows[2]["image"]).read_bytes(), "path": None}
    columns["image"][3] = None
    found = [one for n in (0, 11) for one in results_of(answerer({k: v[n : n + 11] for k, v in columns.items()}))]
    answerer.close()
    assert [one.id for one in found] == [row["id"] for row in rows]
    assert [one.answer for one in found] == [None if n == 3 else answer for n, answer in enumerate(answers)]
    assert "`image` is nothing" in str(found[3].error) and "row-5" in str(found[BAD].error)
    assert found[0].right is (answers[0] == rows[0]["answer"]) and found[BAD].right is False
    with pytest.raises(trio.InputError, match="no column image"):
        answerer({"id": columns["id"]})


def test_the_integration_and_the_command_need_no_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['pyarrow'] = None\n"
        "import trio.cli, trio.batch, trio.integrations.ray as r; print(r.RayAnswerer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "RayAnswerer\n", done.stderr


def test_a_batch_that_fails_is_asked_row_by_row(table: tuple[Path, list[dict[str, Any]]]) -> None:
    file, rows = table
    model, processor = zoo.load("tiny-llava")
    pipeline = trio.Pipeline.from_spec("trio-soft-11", model)
    answerer = RowAnswerer(model, processor, pipeline, max_new_tokens=8)
    image = file.parent / rows[0]["image"]
    given = [BatchRow("a", image, rows[0]["question"]), BatchRow("b", image, "<image> <image> what ?")]
    with pytest.raises(trio.InputError, match="not attached"):
        answerer.answer(given)
    with pipeline:
        good, bad = answerer.answer(given)
        assert good.error is None and good.right is None and good.answer
        assert bad.answer is None and bad.error and "\n" not in bad.error
    engine = LocalEngine(answerer, 2)
    assert [one.id for one in engine.answers(open_rows(file), {row["id"] for row in rows[2:]})] == ["row-0", "row-1"]
    assert not pipeline.attached


class Watched(RowAnswerer):
    """Does not ask a batch before the next one is prepared, of which it notes the size and the thread."""

    batches, asked = 5, 0

    def __init__(self) -> None:
        model, processor = zoo.load("tiny-llava")
        super().__init__(model, processor, trio.Pipeline.from_spec("trio-soft-11", model), max_new_tokens=8)
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.changed = threading.Condition()

    def prepare(self, rows: Sequence[BatchRow]) -> PreparedRows:
        made = super().prepare(rows)
        with self.changed:
            self.sizes.append(len(rows))
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
        return made

    def ask(self, prepared: PreparedRows) -> list[RowOutput]:
        self.asked += 1
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.sizes) >= min(self.asked + 1, self.batches), 60)
        return super().ask(prepared)


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_next_batches_are_prepared_while_the_model_has_one(
    ahead: int, table: tuple[Path, list[dict[str, Any]]], answers: list[str | None]
) -> None:
    """And not more of them; the rows come in their order, and an image that is no image is its row's error alone."""
    file, rows = table
    answerer, found = Watched(), []
    for one in LocalEngine(answerer, 5, ahead=ahead).answers(open_rows(file), set()):
        found.append(one)
        assert len(answerer.sizes) <= answerer.asked + ahead
    assert [one.id for one in found] == [row["id"] for row in rows]
    assert [one.answer for one in found] == answers
    assert [number for number, one in enumerate(found) if one.error] == [BAD]
    assert answerer.sizes == [5, 5, 5, 5, 2]
    assert all(name.startswith("trio-prepare") for name in answerer.threads) and len(answerer.threads) == 1


def test_a_second_call_of_the_class_for_ray_reads_while_the_first_has_the_model(
    table: tuple[Path, list[dict[str, Any]]], answers: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows = table
    read, inside, first = threading.Semaphore(0), threading.Lock(), threading.Event()
    prepare, ask = RowAnswerer.prepare, RowAnswerer.ask

    def prepares(self: RowAnswerer, rows: Sequence[BatchRow]) -> PreparedRows:
        made = prepare(self, rows)
        read.release()
        return made

    def asks(self: RowAnswerer, prepared: PreparedRows) -> list[RowOutput]:
        assert inside.acquire(blocking=False)  # one at a time
        try:
            if not first.is_set():
                first.set()
                assert read.acquire(timeout=60) and read.acquire(timeout=60)  # its own batch, and the other
            return ask(self, prepared)
        finally:
            inside.release()

    monkeypatch.setattr(RowAnswerer, "prepare", prepares)
    monkeypatch.setattr(RowAnswerer, "ask", asks)
    answerer = RayAnswerer("tiny-llava", "trio-soft-11", max_new_tokens=8, folder=file.parent)
    columns = {
        name: np.array([row[name] for row in rows], dtype=object) for name in ("id", "image", "question", "answer")
    }
    halves = [{name: values[n : n + 11] for name, values in columns.items()} for n in (0, 11)]
    with ThreadPoolExecutor(2) as pool:
        found = [one for made in pool.map(answerer, halves) for one in results_of(made)]
    answerer.close()
    assert [one.answer for one in found] == answers


def test_a_job_that_is_terminated_writes_what_is_answered_and_leaves_no_thread(
    table: tuple[Path, list[dict[str, Any]]],
    answers: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, rows = table
    asked: list[RowAnswerer] = []
    ask = RowAnswerer.ask

    def terminates(self: RowAnswerer, prepared: PreparedRows) -> list[RowOutput]:
        asked.append(self)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, prepared)

    def unhandled(*_: object) -> None:
        raise AssertionError("SIGTERM ended the process")

    given = ("--input", file, "--out", tmp_path, "--max-new-tokens", 8, "--batch-size", 5)
    before = signal.signal(signal.SIGTERM, unhandled)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RowAnswerer, "ask", terminates)
            result = batch(*given)
        assert signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130 and "goes on where it was" in result.stderr
    assert [line["answer"] for line in written(tmp_path)] == answers[:10]
    assert not asked[0].pipeline.attached
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trio-prepare")]
    assert batch(*given).exit_code == 0
    assert [line["id"] for line in written(tmp_path)] == [row["id"] for row in rows]
    assert [line["answer"] for line in written(tmp_path)] == answers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workers", "2"], "--workers: it is for a Ray cluster; add --ray local"),
        (["--ordered"], "--ordered: it is for a Ray cluster"),
        (["--engine", "vllm"], "inside the language model"),
        (["--engine", "vllm", "--spec", "{folder}/alone.yaml"], "vLLM is not installed"),
        (["--engine", "vllm", "--ray", "local"], "--ray: not with --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "--device: not with --engine vllm"),
        (["--engine", "vllm", "--workers", "2"], "--workers: not with --engine vllm"),
        (["--spec", "trio-111"], "no shipped spec 'trio-111'"),
        (["--model", "nothing"], "model 'nothing'"),
        (["--input", "nothing.jsonl"], "there is no such file"),
        (["--input", "{folder}/bad.png"], "none of .parquet, .jsonl"),
        (["--input", "{folder}"], "one for all of them (--question)"),
        (["--ray", "local"], "Ray Data is not installed"),
    ],
)
def test_mistakes_are_one_paragraph(
    given: list[str], message: str, table: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(jobs, "find_spec", lambda name: None)
    (table[0].parent / "alone.yaml").write_text(ALONE)
    options = {"--input": str(table[0]), "--out": str(tmp_path / "out")}
    pairs = dict(zip(given[::2], given[1::2], strict=False)) if len(given) > 1 else {}
    words = [word for pair in (options | pairs).items() for word in pair] + (given if len(given) == 1 else [])
    result = batch(*(word.replace("{folder}", str(table[0].parent)) for word in words))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


# The job -------------------------------------------------------------------------------------------------------------


def test_a_job_that_was_stopped_goes_on(table: tuple[Path, Any], tmp_path: Path) -> None:
    source, first, second = open_rows(table[0]), Recorded(stop=13), Recorded()
    with Shards(tmp_path, SETTINGS) as shards, pytest.raises(KeyboardInterrupt):
        run_job(source, shards, lambda: first, shard_rows=5)
    assert [line["id"] for line in written(tmp_path)] == first.asked and len(first.asked) == 13
    (tmp_path / "part-000009.jsonl.partial").write_text('{"id": "row-20", "ans')  # killed while it wrote
    told = []
    with Shards(tmp_path, SETTINGS) as shards:
        summary = run_job(source, shards, lambda: second, shard_rows=5, progress=lambda *a: told.append(a))
    assert first.asked + second.asked == [f"row-{n}" for n in range(ROWS)] and summary.rows == ROWS
    assert told[0] == (13, ROWS) and told[-1] == (ROWS, ROWS)
    assert [line["id"] for line in written(tmp_path)] == first.asked + second.asked


def test_engines_that_lose_or_repeat_rows_are_found(table: tuple[Path, Any], tmp_path: Path) -> None:
    for name, engine, message in (
        ("a", Recorded(twice=True), "twice"),
        ("b", Recorded(leave=True), f"{ROWS - 1} of {ROWS} rows"),
    ):
        with Shards(tmp_path / name, SETTINGS) as shards, pytest.raises(trio.InputError, match=message):
            run_job(open_rows(table[0]), shards, lambda engine=engine: engine, shard_rows=5)


def test_a_folder_is_of_one_job_and_one_process(table: tuple[Path, Any], tmp_path: Path) -> None:
    with Shards(tmp_path, SETTINGS) as shards:
        run_job(open_rows(table[0]), shards, Recorded, shard_rows=50)
        if os.name == "posix":
            with pytest.raises(trio.InputError, match="another process"):
                Shards(tmp_path, SETTINGS)
    with pytest.raises(trio.InputError, match="other model"):
        Shards(tmp_path, {"model": "another"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"image": "a.png", "question": "what ?"}\n')
    with Shards(tmp_path, SETTINGS) as shards, pytest.raises(trio.InputError, match="which the input"):
        run_job(open_rows(other), shards, Recorded, shard_rows=5)
    (tmp_path / "job.json").unlink()
    with pytest.raises(trio.InputError, match=r"no job\.json"):
        Shards(tmp_path, SETTINGS)


def test_rows_of_a_table(table: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"image": "a.png", "answer": ["x", "y"], "more": 1}\n\n{"image": "b.png", "id": 7, "question": "?"}\n'
    )
    first, second = open_rows(file, "what ?").rows()
    assert (first.id, first.question, first.answers) == ("1", "what ?", ("x", "y"))
    assert (second.id, second.question, second.image) == ("7", "?", tmp_path.resolve() / "b.png")
    with pytest.raises(trio.InputError, match=r"line 1: it has no `question`"):
        list(open_rows(file).rows())
    file.write_text('{"image": "a.png", "id": "1"}\n{"image": "a.png", "id": 1}\n')
    with Shards(tmp_path / "o", SETTINGS) as shards, pytest.raises(trio.InputError, match="two rows have the id '1'"):
        run_job(open_rows(file, "?"), shards, Recorded, shard_rows=5)
    folder = [row.id for row in open_rows(table[0].parent, "what ?").rows()]
    assert folder == sorted(folder) and "bad.png" in folder and "rows.jsonl" not in folder


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = open_rows(tmp_path / "a.parquet")
    assert isinstance(source, ParquetRows)
    with pytest.raises(trio.InputError, match=r"\[batch\]"):
        next(source.ids())


# Room on a cluster ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus", "problem"),
    [
        ([(2, 0)], 2, 1.0, 0.0, "the job would hang"),
        ([(2, 0)], 2, 0.5, 0.0, ""),
        ([(2, 0)], 3, 1.0, 0.0, "do not fit"),
        ([(16, 8)], 8, 1.0, 1.0, ""),
        ([(8, 8)], 8, 1.0, 1.0, "the job would hang"),
        ([(16, 8)] * 8, 64, 1.0, 1.0, ""),
        ([(16, 8)] * 8, 65, 1.0, 1.0, "do not fit"),
        ([(16, 8)], 16, 0.5, 0.5, ""),
        ([(4, 0), (4, 0)], 2, 4.0, 0.0, "the job would hang"),
        ([(3, 1), (3, 0)], 2, 1.0, 1.0, "do not fit"),
    ],
)
def test_actors_that_would_wait_for_ever_are_refused(
    nodes: list[tuple[float, float]], workers: int, cpus: float, gpus: float, problem: str
) -> None:
    if not problem:
        check_room(nodes, workers, cpus, gpus)
        return
    with pytest.raises(trio.InputError, match=problem):
        check_room(nodes, workers, cpus, gpus)


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_about_scale_shows_what_was_measured() -> None:
    from benchmarks.scale import PAGE, RESULT, table

    measured = json.loads(RESULT.read_text())
    assert table(measured) in PAGE.read_text(encoding="utf-8")
    parts = sum(measured["parts"].values()) + measured["write"]
    assert 0.7 < measured["job"] / parts < 1.4
