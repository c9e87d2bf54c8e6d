"""`trio eval` as a user meets it: what it prints and writes, what it refuses."""

from __future__ import annotations

import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from trio.cli import app
from trio.measure.evaluation.results import EvaluationResults


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("eval") / "out"
    return trio_("--spec", "trio-11", "--limit", "1", "--out", out, "--speed-rounds", "1", "--batch-size", "5"), out


def test_it_prints_the_table_the_gate_and_what_they_say(done: tuple[Result, Path]) -> None:
    result, out = done
    assert result.exit_code == 0, result.output
    for word in (
        "full",
        "trio-11",
        "random",
        "uniform",
        "average-pool, equal tokens",
        "average-pool, equal cost",
        "oracle",
        "none after layer 0",
    ):
        assert word in result.stdout
    assert "no image" in result.stdout and "wrong image" in result.stdout
    assert "Validity gate" in result.stdout and "existence-adversarial, layer 0" in result.stdout
    words = " ".join(result.stdout.split())
    assert re.search(
        r"trio-11 against random[^;]*: too few scenes to tell: [^;]*; on 1 scene no p can be below 1.000", words
    )
    assert "note: 1 image is too few for intervals by bootstrap" in words
    assert f"written to {out}: results.json, results.csv, report.html" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100


def test_it_writes_results_that_can_be_read(done: tuple[Result, Path]) -> None:
    _, out = done
    results = EvaluationResults.load(out / "results.json")
    assert results.model["name"] == "tiny-llava" and results.model["visual_tokens"] == 144
    assert results.task["name"] == "shapesvqa" and results.task["version"] == 1 and results.task["scenes"] == 1
    assert [row.name for row in results.methods] == ["trio-11"]
    assert results.row("wrong image").refused == "there is only one image"
    assert "wrong image: not applicable: there is only one image" in results.notes
    assert set(results.speed) == {row.name for row in results.rows if not row.refused} - {"no image"}
    assert results.speed["full"].batch == 5 and results.speed["full"].first_token > 0
    assert "there is only one image" in (out / "results.csv").read_text()


def test_the_report_needs_nothing_else(done: tuple[Result, Path]) -> None:
    page = (done[1] / "report.html").read_text()
    assert page.count("<svg") == 3 and page.count("data:image/png;base64,") == 1
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)", page)
    for title in ("Validity gate", "Paired differences", "By sub-task", "What the numbers say", "Samples"):
        assert title in page
    assert "it ranks nothing else" in page


def test_questions_of_ones_own(tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((168, 168)).convert("RGB").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"is there a {c} star?", "answer": ["no", "none"]} for c in ("red", "blue")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--task", "jsonl", "--data", tmp_path / "q.jsonl", "--max-new-tokens", "2", "--no-html")
    result = trio_("--spec", "trio-11", *given, "--out", tmp_path / "out", "--speed-rounds", "0")
    assert result.exit_code == 0, result.output
    assert "No sub-task" in result.stdout or "no sub-task passes the gate" in result.stdout
    assert "oracle, after 0, 2, 3: 11.1%: not applicable" in " ".join(result.stdout.split())
    results = EvaluationResults.load(tmp_path / "out" / "results.json")
    assert results.kinds == ["all"] and results.settings["max_new_tokens"] == 2 and not results.speed
    assert not (tmp_path / "out" / "report.html").exists()


def test_who_stops_it_is_told_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trio.measure.evaluation.runner.Runner.generate", stop)
    result = trio_("--spec", "trio-11", "--limit", "1", "--out", tmp_path / "out", "--no-html")
    assert result.exit_code == 130 and "goes on where it was" in result.stderr
    assert (tmp_path / "out" / "header.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--spec", "trio-111"], "no shipped spec 'trio-111'"),
        (["--spec", "trio-11", "--spec", "trio-11"], "2 of them are called 'trio-11'"),
        (["--spec", "trio-11", "--baseline", "x"], "none of the specs"),
        (["--spec", "trio-11", "--task", "jsonl"], "data: missing"),
        (["--spec", "trio-11", "--data", "x"], "draws its own images"),
        (["--spec", "trio-11", "--limit", "2001"], "give 1 to 2000"),
        (["--spec", "trio-11", "--model", "nothing"], "model 'nothing'"),
        (["--spec", "trio-llava-1.5-64"], "trio-llava-1.5-64"),
    ],
)
def test_mistakes_are_one_paragraph(given: list[str], message: str, tmp_path: Path) -> None:
    result = trio_(*given, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("module", ["scipy", "jinja2", "rapidfuzz"])
def test_without_the_extra_a_measurement_says_so_before_it_begins(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [one for one in sys.modules if one.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    commands = [["eval", "--spec", "trio-11", "--out", tmp_path / "out"]] if module != "rapidfuzz" else []
    if module != "jinja2":
        commands += [["fidelity", "tiny-llava", "--images", tmp_path]]
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 2, result.output
        assert f"{module} is not installed" in result.stderr and "[eval]'" in result.stderr
        assert not (tmp_path / "out").exists()


def test_the_results_can_be_printed_as_one_object(tmp_path: Path) -> None:
    given = ("--limit", "1", "--out", tmp_path / "out", "--no-html", "--speed-rounds", "0", "--json")
    result = trio_("--spec", "trio-11", *given)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_without_matplotlib_it_says_so_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = trio_("--spec", "trio-11", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "trio-vlm[plot]" in result.stderr and "--no-html" in result.stderr
    assert not (tmp_path / "out").exists()
