"""Several processes of one evaluation: byte for byte what one gives, and an error of one is an error of all."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trio
from trio import zoo
from trio.cli import app
from trio.measure import evaluation
from trio.measure.evaluation.processes import ALONE, Processes, joined, launched
from trio.measure.evaluation.results import EvaluationResults

SPEC = {"name": "ours", "stages": [{"after_layer": 0, "keep": "11.1%"}]}
GIVEN = ("--spec", "trio-11", "--limit", "1", "--batch-size", "4", "--speed-rounds", "0", "--threads", "1", "--no-html")
#: What `accelerate launch` does for GPUs; with ``--cpu`` it begins one process.
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@dataclass
class Room:
    """Where threads that stand for processes exchange what they made."""

    count: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.values = threading.Barrier(self.count, timeout=120), [None] * self.count


@dataclass(frozen=True)
class Threads(Processes):
    """Processes of which each is a thread."""

    room: Any = None

    def _all(self, value: Any) -> list[Any]:
        self.room.values[self.rank] = pickle.dumps(value)
        self.room.barrier.wait()
        found = [pickle.loads(one) for one in self.room.values]
        self.room.barrier.wait()
        return found


def in_threads(count: int, work: Any) -> list[Any]:
    """What `work(processes)` returns or raises in each of so many threads."""
    room, found = Room(count), [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, count, room))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return found


def run(out: Path, processes: Processes = ALONE, **more: Any) -> EvaluationResults:
    task = evaluation.shapesvqa(limit=2)
    return evaluation.evaluate(
        *zoo.load("tiny-llava"), task, [SPEC], out=out, batch_size=8, speed_rounds=0, processes=processes, **more
    )


def answers(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((out / "answers").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationResults, Path]:
    out = tmp_path_factory.mktemp("one") / "out"
    return run(out), out


def test_any_number_of_processes_gives_the_same(whole: tuple[EvaluationResults, Path], tmp_path: Path) -> None:
    """Three batches on four processes: one never asks, and knows the results all the same."""
    results, one = whole
    found = in_threads(4, lambda processes: run(tmp_path / "out", processes))
    assert [each.to_json() for each in found] == [results.to_json()] * 4
    assert answers(tmp_path / "out") == answers(one)


def test_a_run_that_one_began_is_ended_by_several(whole: tuple[EvaluationResults, Path], tmp_path: Path) -> None:
    """Rows that are there as a whole, in part and not at all."""
    results, one = whole
    shutil.copytree(one, tmp_path / "out")
    files = sorted((tmp_path / "out" / "answers").iterdir())
    for number, file in enumerate(files):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[: (len(lines), 8, 11, 0)[number % 4]]))
    told: list[tuple[int, int]] = []
    found = in_threads(
        2, lambda p: run(tmp_path / "out", p, progress=lambda *now: told.append(now) if p.first else None)
    )
    assert [each.to_json() for each in found] == [results.to_json()] * 2
    assert answers(tmp_path / "out") == answers(one)
    assert 0 < told[0][0] < told[-1][0] == told[-1][1]


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path) -> None:
    """The first alone looks into the folder; the others must not wait for it."""
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "x.jsonl").write_text("")
    found = in_threads(3, lambda processes: run(tmp_path, processes))
    assert [type(one) for one in found] == [trio.InputError] * 3
    assert all("no header.json" in str(one) for one in found)


def test_what_one_makes_is_gathered_by_rank() -> None:
    def fails(rank: int) -> int:
        if rank == 1:
            raise trio.SpecError("of the second")
        return rank

    assert in_threads(3, lambda p: p.gather(lambda: p.rank * 2)) == [[0, 2, 4]] * 3
    assert in_threads(3, lambda p: p.together(lambda: p.rank * 2)) == [0, 2, 4]
    found = in_threads(3, lambda p: p.gather(lambda: fails(p.rank)))
    assert [str(one) for one in found] == ["of the second"] * 3


def test_launched_processes_write_what_one_writes(tmp_path: Path) -> None:
    """The command itself, over real sockets."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    result = CliRunner().invoke(app, ["eval", *GIVEN, "--out", str(alone)])
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", *LAUNCH, "-m", "trio.cli", "eval", *GIVEN, "--out", str(both)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (both / "results.json").read_bytes() == (alone / "results.json").read_bytes()
    assert answers(both) == answers(alone)
    assert done.stdout.count("written to") == 1


@pytest.mark.parametrize(("rank", "count", "found"), [("1", "4", (1, 4)), ("0", "1", (0, 1)), ("", "2", (0, 1))])
def test_a_launcher_is_known_by_what_it_sets(
    rank: str, count: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    processes = launched()
    assert (processes.rank, processes.count) == found


def test_processes_that_cannot_meet_are_told_so() -> None:
    with pytest.raises(trio.InputError, match="number 1 of 2 could not meet"), joined(Processes(1, 2), "nowhere://"):
        pass


def test_each_process_has_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = Processes(1, 2)
    assert [second.device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert ALONE.device("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(trio.InputError, match="this machine has 2"):
        Processes(2, 3).device("auto")


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        (["--workers", "2"], "1", "add --ray local"),
        (["--ray", "local"], "2", "a launcher began 2 processes"),
    ],
)
def test_ray_and_launchers_exclude_each_other(
    given: list[str], ranks: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    result = CliRunner().invoke(app, ["eval", *GIVEN, *given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()
