"""`docs/results.md`: made from the committed results, and its sentences follow from the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trio
from benchmarks.results import measured, page, verdict
from trio import zoo
from trio.evaluation.protocol import weights
from trio.evaluation.results import Comparison, Estimate, Gate, Results, RowResult
from trio.evaluation.shapes import shapesvqa

DOCS = Path(trio.__file__).parent.parent / "docs"


def test_the_page_is_made_from_the_committed_results() -> None:
    assert page(measured()) == (DOCS / "results.md").read_text()


def test_committed_results_are_of_what_ships() -> None:
    hashes: dict[str, str] = {}
    for file in measured():
        results = Results.load(file)
        name, task = results.model["name"], results.task
        assert name in zoo.names()
        assert results.model["weights"] == hashes.setdefault(name, weights(zoo.load(name)[0]))
        asked = shapesvqa(task["split"], limit=task["scenes"], canvas=task["canvas"], seed=task["seed"])
        assert asked.fingerprint() == task["sha256"]
        assert all(len(text) == len(asked.samples) == task["questions"] for text in results.right.values())


def compared(row: str, baseline: str, mean: float, p: float, p_inferior: float) -> Comparison:
    return Comparison(
        row=row,
        baseline=baseline,
        same_schedule=True,
        kinds=["colour"],
        gated=True,
        difference=Estimate(mean=mean, low=mean - 1, high=mean + 1),
        p=p,
        p_holm=p,
        p_baseline_inferior=p_inferior,
        p_baseline_inferior_holm=p_inferior,
        margin=1.0,
        power=0.25,
        scenes_for_90=1234,
    )


def row(name: str, control: str = "", schedule: str = "s", **more: Any) -> RowResult:
    found = {"colour": Estimate(mean=80, low=70, high=90)}
    found |= {"overall": found["colour"], "counted": found["colour"]}
    fields = {"tokens": 144.0, "average": 16.0, "flops": 1e9, "accuracy": found, "retained": dict(found)}
    return RowResult(name=name, control=control, schedule=schedule, **{**fields, **more})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    nothing: dict[str, Any] = {"tokens": None, "average": None, "flops": None, "accuracy": {}, "retained": {}}
    made = Results(
        model={"name": "m", "weights": "0" * 64, "layers": 8, "dtype": "float32", "visual_tokens": 144},
        task={
            "name": "shapesvqa",
            "version": 1,
            "split": "test",
            "canvas": "square",
            "sha256": "1" * 64,
            "questions": 9,
            "scenes": 1,
            "kinds": {"colour": 9},
        },
        settings={"margin": 1.0},
        versions={"trio-vlm": "0"},
        rows=[
            row("full", "full", "", average=144.0),
            row("no picture", "no picture", ""),
            row("none after layer 0", "none", ""),
            row("ours, 11%"),
            row("good, 11%"),
            row("bad, 11%"),
            row("random, s", "random"),
            row("uniform, s", "uniform"),
            row("oracle, s", "oracle", refused="no map", **nothing),
        ],
        gates=[
            Gate(
                kind="colour",
                first=0,
                full=95,
                sees=60,
                random_loses=5,
                random_row="random, s",
                late_loses=60,
                passes=False,
            )
        ],
        comparisons=[
            compared("good, 11%", "ours, 11%", 4.0, 0.01, 0.9),
            compared("bad, 11%", "ours, 11%", -4.0, 0.01, 0.001),
            compared("random, s", "ours, 11%", -10.0, 0.001, 0.001),
            compared("uniform, s", "ours, 11%", -0.5, 0.6, 0.3),
            compared("random, s", "bad, 11%", 3.0, 0.02, 0.9),
            compared("uniform, s", "bad, 11%", -3.0, 0.02, 0.001),
        ],
        notes=["tome: refused"],
        questions={"scene": [0] * 9, "kind": ["colour"] * 9},
        right={"full": "1" * 9},
    )
    file = tmp_path / "eval-m.json"
    file.write_text(made.to_json())
    return file


def test_sentences_follow_from_the_numbers(results: Path) -> None:
    text = page([results])
    assert "| good | +4.0 (+3.0 to +5.0) BELOW |" in text
    assert "| bad | -4.0 (-5.0 to -3.0) above, non-inferior |" in text
    assert "- good, 11% is **above** the default ours, 11%: +4.0 (+3.0 to +5.0)." in text
    assert "no sub-task passes the gate" in text
    same = "with the same counts at the same layers"
    assert f"- Significantly **below** random tokens {same}: bad, 11% -3.0 (-4.0 to -2.0) *." in text
    assert f"- Not shown to be above random tokens {same}: none." in text
    assert f"- Not shown to be above a uniform grid {same}: ours, 11% +0.5 (-0.5 to +1.5)." in text
    assert "| oracle, s | not applicable |" in text
    assert "- tome: refused" in text
    assert "90% would take 1,234 to 1,234 scenes" in text
    assert "| colour, layer 0 | 95.0 | +60.0 | +5.0 | +60.0 | no |" in text


@pytest.mark.parametrize(
    ("mean", "p", "p_inferior", "said"),
    [
        (-2, 0.01, 0.2, "above"),
        (2, 0.01, 0.2, "BELOW"),
        (-2, 0.2, 0.01, "non-inferior"),
        (-2, 0.01, 0.01, "above, non-inferior"),
        (-2, 0.2, 0.2, "open"),
    ],
)
def test_verdicts_are_about_the_baseline(mean: float, p: float, p_inferior: float, said: str) -> None:
    assert verdict(compared("a", "b", mean, p, p_inferior)) == said
