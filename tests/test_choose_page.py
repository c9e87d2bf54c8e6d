"""Smaller images of equal total cost, gentle budgets, engines, verdicts: pages and figures with and without them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from test_results_page import DOCS, compared, row

from benchmarks import choose, engines, equal_cost, evaluate, figures, gentle, readme
from benchmarks.results import RESULTS, pages
from trio.measure.evaluation.results import EvaluationResults, Gate, RowResult
from trio.measure.statistics import Estimate
from trio.spec import load_spec, shipped_specs

SCENES, ASKED = 40, 5
POOL = {"compressor": {"name": "average-pool", "keep": "60%"}}


def control(name: str, kind: str, right: float, flops: float, schedule: str = "after 0: 11.1%") -> RowResult:
    found = Estimate(mean=right, low=right - 2, high=right + 2)
    accuracy = {"colour": found, "overall": found, "counted": found}
    return row(name, kind, schedule, accuracy=accuracy, answer_flops=flops, draws=[name])


def made(
    *, gain: float | None = 5.0, p: float = 0.001, sizes: bool = True, pooled: bool = False, counted: bool = True
) -> EvaluationResults:
    """A default at 11% and one method, beside rows of equal cost that are `gain` points above the default."""
    what = "average-pool" if pooled else "resize"
    rows = [
        control("full", "full", 99, 10e9, ""),
        control("no image", "no image", 20, 10e9, ""),
        control("ours, 11%", "", 80, 5e9),
        control("bad, 11%", "", 70, 4e9),
        control("random, s", "random", 50, 4e9),
        control(f"{what}, equal tokens, s", "equal tokens", 30, 1e9),
    ]
    comparisons = [
        compared("bad, 11%", "ours, 11%", -10.0, 0.001, 0.001),
        compared("random, s", "ours, 11%", -30.0, 0.001, 0.001),
    ]
    if gain is not None:
        equal = f"{what} to 48.0%, equal cost, s"
        rows.append(control(equal, "equal cost", 80 + gain, 4.9e9))
        rows[2] = rows[2].model_copy(update={"equal_cost": equal})
        comparisons.append(compared(equal, "ours, 11%", gain, p, 0.9))
    if sizes:
        rows += [control(f"{what} to {share}.0%", "size", share, 1e8 * share, "") for share in (75, 25)]
    if pooled:
        rows = [one.model_copy(update={"spec": POOL}) if what in one.name else one for one in rows]
    if not counted:
        rows = [one.model_copy(update={"answer_flops": None}) for one in rows]
    right = {one.name: "1" * (SCENES * ASKED) for one in rows}
    gate = Gate(
        kind="colour", first=0, full=99, sees=79, random_loses=49, random_row="random, s", late_loses=60, passes=True
    )
    return EvaluationResults(
        model={"name": "m", "weights": "0" * 64, "layers": 8, "dtype": "float32", "visual_tokens": 144},
        task={
            "split": "test",
            "canvas": "square",
            "sha256": "1" * 64,
            "questions": SCENES * ASKED,
            "scenes": SCENES,
            "kinds": {"colour": SCENES * ASKED},
        },
        settings={"margin": 2.0},
        versions={"trio-vlm": "0"},
        rows=rows,
        gates=[gate],
        comparisons=comparisons,
        questions={
            "scene": [scene for scene in range(SCENES) for _ in range(ASKED)],
            "kind": ["colour"] * (SCENES * ASKED),
        },
        right=right,
    )


def first_page(results: EvaluationResults, folder: Path) -> dict[str, str]:
    file = folder / "eval-m.json"
    file.write_text(results.to_json())
    return pages([file])


# Where a smaller image is better, the page says so first


@pytest.mark.parametrize("pooled", [False, True])
def test_a_better_smaller_image_is_said_before_any_number_of_a_method(pooled: bool, tmp_path: Path) -> None:
    results = made(pooled=pooled)
    what = "Average-pool" if pooled else "Resize"
    said = f"**{what} at equal total cost is significantly above** ours, 11% by +5.0 (+4.0 to +6.0)."
    found = first_page(results, tmp_path)
    assert found["results.md"].index(said) < found["results.md"].index("How the default")
    page = found["results/m.md"]
    assert page.index(said) < page.index("| ")
    budget = page[page.index("### 16.0 of 144") :]
    assert budget.index(said) < budget.index("| ")
    block = readme.block(results)
    assert block.index(said) < block.index("| ")
    (tmp_path / "eval-m.json").write_text(results.to_json())
    chosen = choose.blocks(tmp_path)["equal cost"]
    assert chosen.index(said) < chosen.index("| ")
    assert f"| m | ours, 11% | 50% | 80.0 (78.0 to 82.0) | {what.lower()} to 48.0% | 85.0 (83.0 to 87.0) |" in chosen
    assert f"| {what.lower()}, equal cost | 85.0 (83.0 to 87.0) |" in block


@pytest.mark.parametrize(
    ("gain", "p", "said"),
    [
        (5.0, 0.2, "**Resize at equal total cost is above, not significantly,** ours, 11% by +5.0"),
        (-5.0, 0.001, "Resize at equal total cost is above none of the methods here (1)."),
    ],
)
def test_the_sentence_follows_from_the_numbers(gain: float, p: float, said: str) -> None:
    assert said in equal_cost.sentence(made(gain=gain, p=p))
    star = " *" if p < 0.05 else ""
    cell = f"| ours | {-gain:+.1f} ({-gain - 1:+.1f} to {-gain + 1:+.1f}){star} |"
    assert cell in "\n".join(equal_cost.section(made(gain=gain, p=p)))


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path) -> None:
    old = made(gain=None, sizes=False, counted=False)
    found = first_page(old, tmp_path)
    assert "cost.png" not in found["results.md"] and "Not measured in the committed results of m" in found["results.md"]
    assert equal_cost.UNKNOWN in found["results/m.md"] and equal_cost.UNKNOWN in readme.block(old)
    assert figures.plotted([old]).keys() == {"results/accuracy.png", "results/differences.png"}
    assert "equal cost" not in readme.block(old).replace(equal_cost.UNKNOWN, "")


def test_rows_of_earlier_versions_are_called_what_they_are(tmp_path: Path) -> None:
    for pooled, name in ((False, "resize"), (True, "average-pool")):
        results = made(gain=None, sizes=False, pooled=pooled)
        rows = [
            one.model_copy(update={"name": "lower resolution, s"}) if one.control == "equal tokens" else one
            for one in results.rows
        ]
        found = first_page(results.model_copy(update={"rows": rows}), tmp_path)
        assert f"| {name}, equal tokens, s |" in found["results/m.md"]
        assert "lower resolution" not in "".join(found.values())


# Figures


def test_the_figure_of_total_cost_has_the_smaller_images_as_its_line() -> None:
    panel = figures.cost(made())
    assert panel["curves"]["resize, nothing else"] == [[25, 25, 23, 27], [75, 75, 73, 77], [100, 99, 97, 101]]
    assert panel["curves"]["ours"] == [[50, 80, 78, 82]]
    assert figures.cost(made(pooled=True))["curves"].keys() >= {"average-pool, nothing else"}


def test_a_line_that_was_not_measured_is_missing_and_named(tmp_path: Path) -> None:
    results = made(sizes=False)
    assert figures.cost(results)["curves"].keys() == {"ours"}
    text = first_page(results, tmp_path)["results.md"]
    assert "](results/cost.png)" in text and "That line was not measured for m." in text
    assert "That line" not in first_page(made(), tmp_path)["results.md"]


def test_the_figures_are_drawn_with_models_of_both_kinds() -> None:
    found = [made(), made(pooled=True), made(gain=None, sizes=False, counted=False)]
    images = figures.drawn(found)
    assert images.keys() == figures.FIGURES.keys()
    for path, content in images.items():
        with Image.open(io.BytesIO(content)) as image:
            assert image.info["Description"] == figures.digest([figures.FIGURES[path](one) for one in found])


def test_equal_cost_stands_at_the_share_of_the_default() -> None:
    curves = figures.accuracy(made())["curves"]
    assert curves["resize, equal cost"] == [[pytest.approx(100 * 16 / 144, abs=1e-3), 85, 83, 87]]


# Gentle budgets


def answers(wrong: Sequence[int]) -> str:
    return "".join("0" if number in wrong else "1" for number in range(SCENES * ASKED))


@pytest.mark.parametrize(
    ("wrong", "verdict"), [(range(0), "open"), (range(0, 40, 5), "**missed**"), (range(0, 10, 5), "open")]
)
def test_a_loss_is_the_mean_difference_from_the_full_model(wrong: range, verdict: str) -> None:
    results = made()
    results.right["ours, 11%"] = answers(wrong)
    found = gentle.loss(results, results.row("ours, 11%"))
    assert found.gap.mean == pytest.approx(-100 * len(wrong) / (SCENES * ASKED), abs=1e-3)
    sums = np.zeros(SCENES)
    sums[: len(wrong)] = -1  # one wrong answer in each of the first scenes
    residual = sums - ASKED * sums.sum() / (SCENES * ASKED)
    error = np.sqrt((residual**2).sum() * SCENES / (SCENES - 1) + 1) / (SCENES * ASKED)
    assert found.p == pytest.approx(norm.sf((sums.sum() / (SCENES * ASKED) + 0.005) / error), abs=1e-9)
    assert found.verdict == verdict


def test_enough_scenes_show_that_nothing_is_lost() -> None:
    few = made()
    many = few.model_copy(
        update={
            "questions": {"scene": list(range(2000)), "kind": ["colour"] * 2000},
            "right": dict.fromkeys(few.right, "1" * 2000),
        }
    )
    assert gentle.loss(few, few.row("ours, 11%")).verdict == "open"
    assert gentle.loss(many, many.row("ours, 11%")).verdict == "**held**"


def test_the_table_of_gentle_budgets_has_what_was_measured() -> None:
    results = made()
    names = {"ours, 11%": "ours, 50%", "bad, 11%": "engine-divprune, 50%"}
    rows = [
        one.model_copy(update={"name": name, "draws": [name]})
        for one in results.rows
        for name in [names.get(one.name, one.name)]
    ]
    right = {names.get(name, name): text for name, text in results.right.items()}
    right["engine-divprune, 50%"] = answers(range(0, 40, 5))
    comparisons = [
        one.model_copy(update={key: names.get(getattr(one, key), getattr(one, key)) for key in ("row", "baseline")})
        for one in results.comparisons
    ]
    changed = results.model_copy(update={"rows": rows, "right": right, "comparisons": comparisons})
    lines = list(gentle.table([changed]))
    assert lines[0].startswith("| model |  | 50% kept |\n")
    assert "| m | ours | +0.0 (+0.0 to +0.0) open |" in lines
    assert any(line.startswith("| m | engine-divprune | -4.0 (") and "**missed**" in line for line in lines)
    assert "| m | resize, equal cost with ours | +0.0 (+0.0 to +0.0) open |" in lines


# The page "Which spec should I take?"


def test_the_blocks_of_the_page_are_made_from_the_committed_results() -> None:
    text = (DOCS / "choose-a-spec.md").read_text(encoding="utf-8")
    for block in choose.blocks(RESULTS).values():
        assert block in text
    assert text.index("equal cost: python") < text.index("engine: python") < text.index("gentle budgets: python")


def test_the_compressor_for_engines_is_chosen_by_the_worst_model(tmp_path: Path) -> None:
    for name, losses in (("a", {"x": 1, "y": 20}), ("b", {"x": 5, "y": 2})):
        rows = [control("full", "full", 90, 1e9, "")]
        rows += [control(f"{one}, 11%", "", 90 - lost, 1e9, "") for one, lost in losses.items()]
        results = made().model_copy(update={"rows": rows, "model": {"name": name}})
        (tmp_path / f"engine-{name}.json").write_text(results.to_json())
    text = choose.blocks(tmp_path)["engine"]
    assert text.index("| `x` | -5.0 |") < text.index("| `y` | -20.0 |")
    assert "the committed results are older" in text


# Specs


def test_what_is_evaluated_is_what_ships() -> None:
    found = {spec["name"]: load_spec(spec) for spec in evaluate.methods()}
    assert len(found) == len(list(evaluate.methods()))
    for share in ("75", "50", "33", "22", "11"):
        for name, shipped in (("trio-soft (ours)", "trio-soft"), (choose.ENGINE, choose.ENGINE)):
            spec = load_spec(f"{shipped}-{share}")
            evaluated = found[f"{name}, {share}%"]
            told = {"name": "", "description": "", "source": ""}
            if name == shipped:
                assert evaluated.model_copy(update=told) == spec.model_copy(update=told)
            else:
                assert [s.keep for s in evaluated.stages] == [s.keep for s in spec.stages]
                assert evaluated.budget == spec.budget and evaluated.positions == spec.positions
                assert [s.selector for s in evaluated.stages] == [s.selector for s in spec.stages]
        assert found[f"divprune, {share}%"].compressor is not None
    assert "TRIO (paper), 50%" not in found


def test_engine_specs_can_be_decided_before_the_language_model_runs() -> None:
    names = [name for name in shipped_specs() if name.startswith("engine-")]
    assert len(names) == 5 and all(load_spec(name).engine_ready for name in names)
    candidates = [load_spec(spec) for spec in engines.specs()]
    assert all(spec.engine_ready and spec.positions == "auto" for spec in candidates)
    assert {spec.name for spec in candidates} >= {f"divprune, {budget}%" for budget in ("50", "33", "22", "11")}


def test_compressors_for_engines_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shares = {"50": "50%", "11": "11.1%"}
    monkeypatch.setattr(engines, "specs", lambda: evaluate.alone({"name": "divprune"}, shares))
    results = engines.measure("tiny-llava", 1, 8)
    assert [one.name for one in results.rows] == ["full", "divprune, 50%", "divprune, 11%"]
    assert [one.average for one in results.rows] == [144, 72, 16]
    for one in results.rows:
        right = results.right[one.name]
        assert len(right) == results.task["questions"] and one.answer_flops is not None
        assert one.accuracy["overall"].mean == pytest.approx(100 * right.count("1") / len(right), abs=1e-3)
