"""Pages and figures made from the committed results, and the README's table: sentences follow from the numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import trio
from benchmarks import figures, readme, robust_page, saliency
from benchmarks.findings import PAIRS, findings
from benchmarks.results import RESULTS, measured, pages, verdict
from benchmarks.tables import budgets, flipped, with_block
from trio import zoo
from trio.measure.evaluation.protocol import weights
from trio.measure.evaluation.results import Comparison, EvaluationResults, Gate, RowResult
from trio.measure.shapesvqa.task import shapesvqa
from trio.measure.statistics import Estimate

DOCS = Path(trio.__file__).parent.parent / "docs"


def test_the_pages_are_made_from_the_committed_results() -> None:
    made = pages(measured())
    for path, text in made.items():
        assert (DOCS / path).read_text() == text, path
    there = {f"results/{file.name}" for file in (DOCS / "results").iterdir()}
    assert there | {"results.md"} == made.keys() | plotted().keys(), "a page or an image that nothing makes"


def plotted() -> dict[str, list[figures.Panel]]:
    """What the committed images show."""
    return figures.plotted([EvaluationResults.load(file) for file in measured() if file.name.startswith("eval-")])


def test_every_model_has_its_page_and_the_first_page_is_short() -> None:
    made = pages(measured())
    there = {file.stem.removeprefix("eval-") for file in measured() if file.name.startswith("eval-")}
    assert made.keys() - {"results.md"} == {f"results/{name}.md" for name in there}
    assert set(zoo.names()) - there <= robust_page.read("verdict").keys(), "a model that no page judges"
    assert len(made["results.md"].splitlines()) < 110
    for path in [*made.keys() - {"results.md"}, *plotted()]:
        assert f"]({path})" in made["results.md"]


def test_the_figures_are_made_from_the_committed_results() -> None:
    assert {"results/accuracy.png", "results/differences.png"} <= plotted().keys() <= figures.FIGURES.keys()
    for path, panels in plotted().items():
        with Image.open(DOCS / path) as image:
            assert image.info["Description"] == figures.digest(panels)


def test_the_figures_show_the_numbers_of_the_results(shown: EvaluationResults) -> None:
    curves, gaps = figures.accuracy(shown), figures.differences(shown)
    for budget, (kept, *value) in zip(
        readme.defaults(shown).values(), curves["curves"]["trio-soft (ours)"], strict=True
    ):
        found = budget.accuracy["counted"]
        assert budget.average is not None and kept == pytest.approx(100 * budget.average / 144, abs=1e-3)
        assert value == pytest.approx([found.mean, found.low, found.high], abs=1e-3)
    assert {"trio-soft (ours)", "divprune", "random", "average-pool, equal tokens"} <= curves["curves"].keys()
    lines = [len(points) for points in curves["curves"].values()]
    assert max(lines) == len(readme.defaults(shown)) and min(lines) >= 3
    one = next(c for c in shown.comparisons if (c.row, c.baseline) == ("visionzip, 11%", "trio-soft (ours), 11%"))
    row = next(row for row in gaps["rows"] if row[0] == "visionzip")
    assert row[1] == pytest.approx(one.difference.mean, abs=1e-3) and row[4] is (one.p_holm < 0.05)


def test_a_figure_says_what_it_was_drawn_from(shown: EvaluationResults) -> None:
    drawn = figures.drawn([shown])
    less = figures.drawn([without(shown, "visionzip, 11%", "TRIO (paper), 11%")])
    for path, content in drawn.items():
        texts = [Image.open(io.BytesIO(one)).info["Description"] for one in (content, less[path])]
        assert texts[0] == figures.digest([figures.FIGURES[path](shown)]) != texts[1]


def test_the_saliency_page_is_made_from_the_committed_results() -> None:
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("saliency-*.json"))]
    assert saliency.page(found) == saliency.PAGE.read_text()


@pytest.fixture(scope="module")
def shown() -> EvaluationResults:
    """What the README shows."""
    return EvaluationResults.load(RESULTS / f"eval-{readme.MODEL}.json")


def table(results: EvaluationResults) -> dict[str, list[str]]:
    """The README's rows: the cells behind each label."""
    lines = [line.strip("| ").split(" | ") for line in readme.block(results).splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def without(results: EvaluationResults, *names: str) -> EvaluationResults:
    """The results had these rows not been there."""
    rows = [row for row in results.rows if row.name not in names]
    compared = [one for one in results.comparisons if not {one.row, one.baseline} & set(names)]
    return results.model_copy(update={"rows": rows, "comparisons": compared})


def test_what_half_precision_changes_is_shown_as_measured() -> None:
    from benchmarks.half import RESULT
    from benchmarks.measured import block

    assert block("testing") in (DOCS / "testing.md").read_text()
    found = json.loads(RESULT.read_text())
    assert all(0.9 < row["same"] / row["tokens"] <= 1 for row in found["rows"]) and len(found["rows"]) == 6
    answers = {row["name"]: row["differ"]["mean"] for row in found["answers"]}  # percent; what docs/testing.md says
    assert answers["trio-soft (ours), 33%"] == answers["trio-soft (ours), 22%"] == 0
    assert max(answers.values()) < 1 and answers["divprune, 11%"] > 0


def test_the_readme_is_made_from_the_committed_results(shown: EvaluationResults) -> None:
    text = (DOCS.parent / "README.md").read_text()
    assert with_block(text, readme.block(shown), "README.md") == text
    with pytest.raises(SystemExit, match=r"README\.md: put the lines"):
        with_block(text.replace(readme.END, ""), readme.block(shown), "README.md")


def test_the_readme_shows_the_default_and_its_controls(shown: EvaluationResults) -> None:
    bases = readme.defaults(shown)
    assert list(bases)[-3:] == ["33%", "22%", "11%"]
    assert bases == {base.name.split(", ")[-1]: base for base, compared in budgets(shown) if len(compared) > 1}
    rows = table(shown)
    assert list(rows.values())[2] == [str(base.accuracy["counted"]) for base in bases.values()]
    assert f"{list(rows)[2]}, {next(iter(bases))}" == shown.methods[0].name
    random = [shown.row(f"random, {base.schedule}") for base in bases.values()]
    assert rows["random, at the default's layers (mean of 5 draws)"] == [str(r.accuracy["counted"]) for r in random]
    for label in ("uniform grid, at the default's layers", "nothing, from the default's first layer", "no image"):
        assert len(rows[label]) == len(bases) and all(rows[label])
    assert rows["everything"] == [str(shown.row("full").accuracy["counted"])] * len(bases)


def test_the_readme_leaves_out_what_was_not_measured(shown: EvaluationResults) -> None:
    less = without(shown, *(row.name for row in shown.rows if row.name.startswith("visionzip, ")), "divprune, 22%")
    before, after = table(shown), table(less)
    assert before.keys() - after.keys() == {"visionzip (compressor)"}
    was = before.pop("divprune (compressor)")
    gone = list(readme.defaults(shown)).index("22%")
    assert after.pop("divprune (compressor)") == [*was[:gone], "", *was[gone + 1 :]]
    assert all(before[label] == cells for label, cells in after.items())


@pytest.mark.parametrize(
    ("mean", "p", "said"),
    [
        (-4.0, 0.01, "significantly above random tokens"),
        (4.0, 0.01, "significantly **below** random tokens"),
        (-4.0, 0.2, "not told apart from random tokens"),
    ],
)
def test_the_readme_says_what_the_numbers_say(mean: float, p: float, said: str, shown: EvaluationResults) -> None:
    base = readme.defaults(shown)["11%"]
    random = f"random, {base.schedule}"
    rest = [one for one in shown.comparisons if (one.row, one.baseline) != (random, base.name)]
    changed = shown.model_copy(update={"comparisons": [*rest, compared(random, base.name, mean, p, 0.5)]})
    text = readme.block(changed)
    assert f"At 11% the default is {said}" in text
    assert f"{-mean:+.1f} ({-mean - 1:+.1f} to {-mean + 1:+.1f}) points" in text


def test_the_readme_says_which_sub_tasks_count(shown: EvaluationResults) -> None:
    def closed(*layers: int) -> list[Gate]:
        """At every layer all sub-tasks count, at these ones all but one."""
        return [
            shown.gates[0].model_copy(
                update={"kind": kind, "first": first, "passes": kind != last or first not in layers}
            )
            for first in range(shown.model["layers"])
            for kind in shown.kinds
        ]

    *others, last = shown.kinds
    late = shown.row("divprune, 22%").model_copy(update={"schedule": "after 7: 22.2%"})
    rows = [late if row.name == late.name else row for row in shown.rows]
    changed = shown.model_copy(update={"rows": rows})
    for layers, said in (
        ((), None),
        (range(8), f"Of {len(shown.kinds)} sub-tasks, the {len(others)} that pass"),
        ((7,), "not the same ones in all rows"),
    ):
        text = readme.block(changed.model_copy(update={"gates": closed(*layers)}))
        assert ("ub-tasks" in text) == (said is not None) and (said or "") in text


def test_committed_results_are_of_what_ships() -> None:
    hashes: dict[str, str] = {}
    for file in measured():
        results = EvaluationResults.load(file)
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
    made = EvaluationResults(
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
            row("no image", "no image", ""),
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
    made = pages([results])
    text = made["results/m.md"]
    assert made.keys() == {"results.md", "results/m.md"} and "**m**, 1 scenes" in made["results.md"]
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


def test_findings_are_paired_differences_of_rows(shown: EvaluationResults) -> None:
    lines = [line.strip("| ").split(" | ") for line in "\n".join(findings(shown)).splitlines()]
    cells = {line[0]: line[1:] for line in lines[2:]}
    bases = list(readme.defaults(shown).values())
    assert len(cells["the default over random tokens"]) == 3
    for cell, base in zip(cells["the default over random tokens"], bases[-3:], strict=True):
        random = next(c for c in shown.comparisons if (c.row, c.baseline) == (f"random, {base.schedule}", base.name))
        assert cell.removesuffix(" *") == flipped(random)
    assert "nms over top-k" in cells and "16 rows of the text behind the image over the prompt's last 4" not in cells
    known = {one.what for one in PAIRS}
    assert set(cells) <= known and len(known) == len(PAIRS)


def test_findings_leave_out_what_was_not_measured(shown: EvaluationResults) -> None:
    less = without(shown, "trio-soft with nms, 22%")
    (line,) = [line for line in findings(less) if line.startswith("| nms over top-k")]
    first, second, third = (cell.strip() for cell in line.split("|")[2:5])
    assert first and not second and third
    assert list(findings(less, budgets=("55",))) == []
