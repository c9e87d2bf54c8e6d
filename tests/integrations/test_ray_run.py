"""Jobs on Ray itself (`make ray`): an actor dies, an image is damaged, the driver is killed: same answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from support.tables import BAD, write_table
from test_examples import blocks

import trio
from trio import zoo
from trio.batch import LocalEngine, RowAnswerer, Shards, open_rows, run_job
from trio.integrations.ray import RayAnswerer, RayEngine, RayEvaluation
from trio.integrations.ray.evaluation import EvaluationWorker
from trio.measure.evaluation.job import EvaluationJob
from trio.spec import load_spec

DOCS = Path(trio.__file__).parent.parent / "docs"
ROWS = 400
SPEC = "trio-soft-11"
OPTIONS: dict[str, Any] = {"model": "tiny-llava", "spec": SPEC, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows as JSON lines, and the same in Parquet with the bytes of the images."""
    folder = tmp_path_factory.mktemp("rows")
    rows = write_table(folder, ROWS)
    for row in rows:
        row["image"] = (folder / row["image"]).read_bytes()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=64)
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def plain(table: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the plain loop gives."""
    model, processor = zoo.load("tiny-llava")
    answerer = RowAnswerer(model, processor, trio.Pipeline.from_spec(SPEC, model), max_new_tokens=8)
    out = tmp_path_factory.mktemp("plain")
    with Shards(out, {}) as shards:
        summary = run_job(open_rows(table), shards, lambda: LocalEngine(answerer, 16), shard_rows=100)
    assert summary.errors == 1 and summary.accuracy is not None and summary.accuracy > 0.9
    return written(out)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20)
    yield
    ray.shutdown()


def written(out: Path) -> list[dict[str, Any]]:
    parts = sorted(out.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_an_actor_that_dies_loses_and_repeats_nothing(
    table: Path, plain: list[dict[str, Any]], cluster: None, tmp_path: Path
) -> None:
    mark = tmp_path / "died"

    class DiesOnce(RayAnswerer):  # within the test, so that actors get its code by value
        calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 3 and not mark.exists():
                mark.touch()
                os._exit(1)
            return super().__call__(batch)

    engine = RayEngine(OPTIONS, 2, batch_size=16, ordered=True, cpus=0.5, answerer=DiesOnce)
    with Shards(tmp_path / "out", {}) as shards:
        summary = run_job(open_rows(table), shards, lambda: engine, shard_rows=100)
    assert mark.exists()
    assert written(tmp_path / "out") == plain
    assert summary.rows == ROWS and list(summary.examples) == [f"row-{BAD}"]


def test_an_actor_reads_one_batch_while_its_model_has_another(
    table: Path, plain: list[dict[str, Any]], cluster: None, tmp_path: Path
) -> None:
    class Meets(RayAnswerer):  # within the test, so that actors get its code by value
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.first, self.both = [1, 2], threading.Barrier(2, timeout=120)

        def __call__(self, batch: Any) -> Any:
            if self.first:
                self.first.pop()
                self.both.wait()  # breaks where calls come one after the other
            return super().__call__(batch)

    engine = RayEngine(OPTIONS, 1, batch_size=16, ordered=True, cpus=0.5, answerer=Meets)
    with Shards(tmp_path, {}) as shards:
        run_job(open_rows(table), shards, lambda: engine, shard_rows=100)
    assert written(tmp_path) == plain


def test_actors_that_take_every_cpu_are_refused(table: Path, cluster: None, tmp_path: Path) -> None:
    engine = RayEngine(OPTIONS, 2, cpus=1.0)
    with Shards(tmp_path, {}) as shards, pytest.raises(trio.InputError, match="would hang"):
        run_job(open_rows(table), shards, lambda: engine, shard_rows=100)


def test_a_job_whose_driver_was_killed_goes_on(
    table: Path, plain: list[dict[str, Any]], cluster: None, tmp_path: Path
) -> None:
    """From Parquet with the images inside, by the command; what is left by an engine on the other cluster."""
    out = tmp_path / "out"
    given = ["--input", table.with_suffix(".parquet"), "--out", out, "--spec", SPEC, "--max-new-tokens", 8]
    ways = ["--ray", "local", "--workers", 2, "--worker-cpus", 0.5, "--batch-size", 16, "--shard-rows", 32]
    code = "import sys; from trio.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "batch", *map(str, [*given, *ways])]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        driver = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            while not list(out.glob("part-*.jsonl")):
                assert driver.poll() is None, log.read_text()
                time.sleep(0.02)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    begun = [line["id"] for line in written(out)]
    assert 0 < len(begun) < ROWS
    engine = RayEngine(OPTIONS, 2, batch_size=16, cpus=0.5)
    settings = json.loads((out / "job.json").read_text())
    with Shards(out, settings) as shards:
        summary = run_job(open_rows(table.with_suffix(".parquet")), shards, lambda: engine, shard_rows=32)
    lines = written(out)
    assert [line["id"] for line in lines[: len(begun)]] == begun
    assert summary.rows == ROWS and summary.errors == 1

    def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without the words of the error, which name a file in one and a row in the other."""
        return sorted(({**row, "error": row["error"] is None} for row in rows), key=lambda row: row["id"])

    assert by_id(lines) == by_id(plain)


def test_the_block_of_the_page_about_scale_runs(table: Path, cluster: None) -> None:
    """`map_batches` with columns in and out, on a small model without a GPU."""
    (code,) = (code for _, code in blocks(DOCS / "scale.md"))
    for shown, smaller in (
        ("llava-hf/llava-1.5-7b-hf", "tiny-llava"),
        ("num_gpus=1", "num_cpus=0.5"),
        ("size=8", "size=1"),
    ):
        assert code.count(shown) == 1
        code = code.replace(shown, smaller)
    rows = [json.loads(line) for line in table.read_text().splitlines()[:6]]
    dataset = ray.data.from_items([{**row, "image": str(table.parent / row["image"])} for row in rows])
    names: dict[str, Any] = {"dataset": dataset, "ray": ray}
    exec(compile(code, "scale.md", "exec", dont_inherit=True), names)
    found = {row["id"]: row for row in names["answered"].take_all()}
    assert len(found) == 6 and found[f"row-{BAD}"]["error"] and not found["row-0"]["error"]
    assert found["row-0"]["answer"] and found["row-0"]["visual_tokens"] == 144


# `trio eval` ---------------------------------------------------------------------------------------------------------


def evaluation_files(out: Path) -> dict[str, bytes]:
    """All that an evaluation wrote, by path."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationJob, dict[str, bytes]]:
    """A job, and what one process without Ray writes."""
    out = tmp_path_factory.mktemp("eval") / "out"
    job = EvaluationJob((load_spec(SPEC),), out, limit=1, batch_size=3, speed_rounds=0, html=False, threads=1)
    job.run()
    return job, evaluation_files(out)


def test_an_evaluation_on_actors_writes_what_one_process_writes(
    evaluated: tuple[EvaluationJob, dict[str, bytes]], cluster: None, tmp_path: Path
) -> None:
    """One of them is lost on the way; the others end, and the next run goes on."""
    job, expected = evaluated
    job = replace(job, out=tmp_path / "out")

    class Dies(EvaluationWorker):  # within the test, so that actors get its code by value
        def _tell(self, done: int, total: int) -> None:
            if self._processes.rank == 1 and done > total // 2:
                os._exit(1)
            super()._tell(done, total)

    with pytest.raises(trio.TrioError, match=r"a worker failed.*goes on where it was"):
        RayEvaluation(2, cpus=0.5, worker=Dies).evaluate(job)
    begun = evaluation_files(job.out)
    assert "results.json" not in begun and any(name.startswith("answers") for name in begun)
    told: list[tuple[int, int]] = []
    results = RayEvaluation(2, cpus=0.5).evaluate(job, lambda *now: told.append(now))
    assert evaluation_files(job.out) == expected
    assert results.to_json().encode() == expected["results.json"]
    assert told and told[0][0] > 0


def test_what_an_actor_refuses_is_told_as_without_ray(
    evaluated: tuple[EvaluationJob, dict[str, bytes]], cluster: None
) -> None:
    job, expected = evaluated
    with pytest.raises(trio.InputError, match="answers with other batch_size"):
        RayEvaluation(2, cpus=0.5).evaluate(replace(job, batch_size=4))
    with pytest.raises(trio.InputError, match="do not fit"):
        RayEvaluation(9).evaluate(job)
    assert evaluation_files(job.out) == expected
