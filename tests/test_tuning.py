"""Tuning: targets, the space of specs, a search that can be stopped, the choice, and the verdict on unseen images."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

import trio
from trio import zoo
from trio.adapters import adapter_for
from trio.cli import app
from trio.errors import BudgetError, InputError, SpecError
from trio.measure.fidelity import PromptSample
from trio.measure.shapesvqa.examples import examples
from trio.measure.tuning import Candidate, TuningReport, best_spec, parse_target, tune
from trio.measure.tuning.plot import draw
from trio.measure.tuning.space import Space
from trio.measure.tuning.study import Study, front
from trio.measure.tuning.trials import Found, Judge, standard_error
from trio.measure.tuning.tune import choose, split
from trio.spec import PipelineSpec, load_spec
from trio.spec.schedule import resolve

ROOT = Path(trio.__file__).parent.parent


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# Targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("agreement>=99%", "agreement", 0.99),
        (" Answers >= 97.5 % ", "answers", 0.975),
        ("similarity>=100%", "similarity", 1.0),
        ("flops<=33%", "flops", 0.33),
        ("tokens<=11.1%", "tokens", 0.111),
        ("speed>=3x", "speed", 3.0),
    ],
)
def test_targets(text: str, metric: str, value: float) -> None:
    target = parse_target(text)
    (bound,) = target.bounds
    assert (bound.metric, bound.value) == (metric, pytest.approx(value))
    assert target.bounds_quality == (metric in ("agreement", "answers", "similarity"))
    assert target.quality == (metric if target.bounds_quality else "agreement")
    assert parse_target(str(bound)) == target
    better, worse = (value + 0.001, value - 0.001) if ">=" in text else (value - 0.001, value + 0.001)
    assert bound.met(value) and bound.met(better) and not bound.met(worse)
    assert bound.miss(better) == 0 < bound.miss(worse)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["agreement=99%"], "this is no condition"),
        (["agreement>=99"], "this is no condition"),
        (["agreemnt>=99%"], "Did you mean 'agreement'"),
        (["agreement<=99%"], "agreement>=NUMBER%"),
        (["flops>=3x"], "flops<=NUMBER%"),
        (["speed>=50%"], "speed>=NUMBERx"),
        (["agreement>=101%"], "out of range"),
        (["flops<=0%"], "out of range"),
        (["flops<=30%", "flops<=20%"], "bounded 2 times"),
        (["agreement>=99%", "answers>=99%"], "one meaning of quality"),
        ([], "there is none"),
    ],
)
def test_wrong_targets(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_target(texts)


# Choosing ------------------------------------------------------------------------------------------------------------


def candidate(trial: int, quality: float, flops: float, kl: float = 0.1, error: float = 0.0) -> Candidate:
    values = {"agreement": quality, "answers": quality, "similarity": quality, "tokens": flops / 2, "flops": flops}
    errors = dict.fromkeys(("agreement", "answers", "similarity"), error)
    return Candidate(trial=trial, values=values, errors=errors, kl=kl, spec={})


TRIED = [candidate(0, 0.90, 0.30), candidate(1, 0.99, 0.50, 0.3), candidate(2, 0.99, 0.60, 0.1), candidate(3, 1.0, 0.9)]


@pytest.mark.parametrize(
    ("target", "best"),
    [
        (["agreement>=95%"], 1),  # the least FLOPs
        (["agreement>=100%"], 3),
        (["flops<=70%"], 2),  # the best quality, then the lowest KL
        (["tokens<=20%"], 0),
        (["agreement>=95%", "tokens<=30%"], 1),
    ],
)
def test_choice(target: list[str], best: int) -> None:
    assert choose(TRIED, parse_target(target)).trial == best


def test_what_meets_a_target_by_a_margin_comes_first() -> None:
    lucky, sure = candidate(0, 0.96, 0.3, error=0.02), candidate(1, 0.98, 0.5, error=0.02)
    target = parse_target("agreement>=95%")
    assert choose([lucky, sure], target) is sure
    assert choose([lucky], target) is lucky
    assert choose([lucky, sure], parse_target("flops<=30%")) is lucky


def test_standard_errors_are_of_images() -> None:
    apart = standard_error([1.0, 0.0] * 50, [str(i) for i in range(100)])
    assert apart == pytest.approx((0.25 / 99) ** 0.5)
    together = standard_error([float(i % 2) for i in range(10) for _ in range(10)], [str(i // 10) for i in range(100)])
    assert together == pytest.approx((0.25 / 9) ** 0.5)
    assert standard_error([1.0, 1.0], ["a", "b"]) == standard_error([1.0, 0.0], ["a", "a"]) == 0.0


def test_a_target_that_nothing_meets_says_the_best_found() -> None:
    with pytest.raises(BudgetError, match=r"none of 4 specs.*agreement 90\.0%, flops 30\.0%\. Ask for less"):
        choose(TRIED, parse_target(["agreement>=95%", "flops<=45%"]))
    with pytest.raises(BudgetError, match=r"has agreement 90\.0%, flops 30\.0%, tokens 15\.0%"):
        choose(TRIED, parse_target("tokens<=10%"))
    with pytest.raises(BudgetError, match="no spec could run"):
        choose([], parse_target("flops<=45%"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=20))
def test_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    tried = [candidate(i, q / 5, 0.1 + f / 10, kl / 2) for i, (q, f, kl) in enumerate(points)]

    def dominated(one: Candidate) -> bool:
        values = [(other.values["agreement"], -other.values["flops"]) for other in tried]
        mine = (one.values["agreement"], -one.values["flops"])
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in values)

    found = front(tried, "agreement")
    expected = {(c.values["flops"], c.values["agreement"]) for c in tried if not dominated(c)}
    assert [(c.values["flops"], c.values["agreement"]) for c in found] == sorted(expected)


# Splitting -----------------------------------------------------------------------------------------------------------


def test_split_is_by_image_and_seeded() -> None:
    image = Image.new("RGB", (8, 8))
    samples = [PromptSample(image, f"q{i}", f"p{i // 3}") for i in range(30)]
    seen, unseen = split(samples, 0.3, 0)
    assert {s.name for s in seen}.isdisjoint(s.name for s in unseen)
    assert len({s.name for s in unseen}) == 3 and len(seen) + len(unseen) == 30
    assert split(samples, 0.3, 0) == (seen, unseen) != split(samples, 0.3, 1)
    assert [s for s in samples if s in seen] == seen  # the order stays
    for share in (0.001, 0.999):
        assert all(split(samples, share, 0))


def test_wrong_splits() -> None:
    samples = [PromptSample(Image.new("RGB", (8, 8)), f"q{i}", "one") for i in range(3)]
    with pytest.raises(InputError, match="1 images cannot be split"):
        split(samples, 0.5, 0)
    with pytest.raises(InputError, match=r"held_out: found 1\.5"):
        split(samples, 1.5, 0)


# The space -----------------------------------------------------------------------------------------------------------


class Dice:
    """Draws parameters at random, or takes those given."""

    def __init__(self, seed: int, given: dict[str, Any] | None = None) -> None:
        self.random, self.given = random.Random(seed), given or {}

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        found = self.given.get(name, self.random.choice(choices))
        assert found in choices
        return found

    def suggest_int(self, name: str, low: int, high: int) -> int:
        found = int(self.given.get(name, self.random.randint(low, high)))
        assert low <= found <= high
        return found

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        found = float(self.given.get(name, self.random.uniform(low, high)))
        assert low <= found <= high
        return found


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def space(tiny: tuple[Any, Any]) -> Space:
    return Space.of(adapter_for(tiny[0]))


def test_space_holds_what_fits(space: Space) -> None:
    assert space.layers == 8
    assert {"objective-gradient", "last-token-attention"} <= set(space.scorers)
    assert space.scorers["last-token-attention"] == 1  # it looks at a layer that has run
    assert {"nms", "soft-nms", "top-k"} <= set(space.selectors)
    assert "visionzip" in space.compressors
    assert "random" not in {*space.scorers, *space.compressors}
    for part, reason in space.left_out.items():
        assert part.split()[-1] not in space.compressors and reason


def test_space_without(tiny: tuple[Any, Any], space: Space) -> None:
    adapter = adapter_for(tiny[0])
    smaller = Space.of(adapter, without=["nms", *space.compressors])
    assert smaller.compressors == () and "nms" not in smaller.selectors
    only = Space.of(adapter, without=space.selectors)
    assert not only.scorers and all(not only.draw(Dice(seed)).stages for seed in range(10))
    with pytest.raises(InputError, match=r"no part 'nmss'.*Did you mean 'nms'"):
        Space.of(adapter, without=["nmss"])
    with pytest.raises(InputError, match="no part is left"):
        Space.of(adapter, without=[*space.selectors, *space.compressors])


def test_every_draw_is_a_spec(space: Space) -> None:
    drawn = [space.draw(Dice(seed)) for seed in range(60)]
    assert {spec.compressor.name for spec in drawn if spec.compressor} == set(space.compressors)
    assert {len(spec.stages) for spec in drawn} == {0, 1, 2, 3}
    assert {stage.scorer.name for spec in drawn for stage in spec.stages} == set(space.scorers)
    for spec in drawn:
        assert load_spec(spec.to_dict()) == spec
        assert spec.compressor is not None or spec.stages
        for stage in spec.stages:
            assert isinstance(stage.after_layer, int) and stage.after_layer >= space.scorers[stage.scorer.name]


def test_a_search_begins_with_the_default(space: Space) -> None:
    starts = space.starts(144)
    assert len(starts) == 3
    spec = space.draw(Dice(0, starts[0]))
    default = load_spec(trio.DEFAULT_SPEC)
    before, after = resolve(default, 8), resolve(spec, 8)
    assert after.layers == before.layers
    assert after.stage_counts(144) == before.stage_counts(144)
    assert [(one.scorer, one.selector) for one in spec.stages] == [(s.scorer, s.selector) for s in default.stages]
    assert spec.positions == default.positions == "original"
    averages = [resolve(space.draw(Dice(0, start)), 8).average(144) / 144 for start in starts]
    assert averages == pytest.approx([0.111, 0.222, 0.333], abs=0.005)


# The search ----------------------------------------------------------------------------------------------------------

SETUP = {"what": "a test"}


def pretend(spec: PipelineSpec) -> Found:
    """More tokens cost more and agree more; top-k cannot run."""
    if spec.stages and spec.stages[0].selector.name == "top-k":
        raise SpecError("stages[0].selector: top-k is not for this test")
    schedule = resolve(spec, 8)
    share = schedule.average(144, compressed=40) / 144
    quality = min(1.0, 0.5 + share)
    values = dict.fromkeys(("agreement", "answers", "similarity"), quality)
    return Found({**values, "flops": share, "tokens": share}, dict.fromkeys(values, 0.01), 1 - quality)


def searched(space: Space, file: Path | None, trials: int, judge: Any = pretend, **options: Any) -> Any:
    study = Study(file, SETUP, **{"seed": 0, "sampler": "tpe", **options})
    return study.run(trials, space, space.starts(144), judge, "agreement", None)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_stopped_search_goes_on_as_if_it_had_not_been(space: Space, tmp_path: Path, sampler: Any) -> None:
    whole = searched(space, None, 22, sampler=sampler)
    calls = 0

    def dies(spec: PipelineSpec) -> Found:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return pretend(spec)

    file = tmp_path / "study.log"
    with pytest.raises(KeyboardInterrupt):
        searched(space, file, 22, dies, sampler=sampler)
    resumed = searched(space, file, 22, sampler=sampler)
    assert resumed == whole
    assert whole.count == 22
    again = searched(space, file, 22, lambda spec: pytest.fail("nothing is left to try"), sampler=sampler)
    assert again == whole
    assert searched(space, None, 22, sampler=sampler, seed=1) != whole


def test_specs_that_cannot_run_are_counted(space: Space) -> None:
    tried = searched(space, None, 20)
    parts = [stage["selector"] for one in tried.candidates for stage in one.spec.get("stages", [])]
    selectors = [part if isinstance(part, str) else part["name"] for part in parts]
    assert sum(tried.refused.values()) + len(tried.candidates) == tried.count == 20
    assert sum(tried.refused.values()) > 0 and set(selectors) <= {"nms"} | set(space.selectors) - {"top-k"}
    assert all("SpecError" in reason for reason in tried.refused)


def test_the_file_of_another_search_is_refused(space: Space, tmp_path: Path) -> None:
    file = tmp_path / "study.log"
    searched(space, file, 2)
    with pytest.raises(InputError, match=r"study.*belongs to another search"):
        Study(file, {"what": "another"}, seed=0, sampler="tpe")
    (tmp_path / "best.yaml").write_text("version: 1\n")
    with pytest.raises(InputError, match=r"best\.yaml.*cannot be read as a search's trials"):
        Study(tmp_path / "best.yaml", SETUP, seed=0, sampler="tpe")


def test_optuna_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install trio-vlm\[tune\]"):
        Study(None, SETUP, seed=0, sampler="tpe")
    result = trio_("tune", "tiny-llava", "--task", "shapesvqa", "--target", "flops<=33%", "--out", "best.yaml")
    assert result.exit_code == 2 and "trio-vlm[tune]" in result.stderr


# On a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> list[PromptSample]:
    return [PromptSample(e.image, e.question, f"scene {e.scene}") for e in examples("validation", 6, 4)][::2]


@pytest.fixture(scope="module")
def report(tiny: tuple[Any, Any], asked: list[PromptSample]) -> TuningReport:
    target = parse_target(["agreement>=60%", "tokens<=50%"])
    options: dict[str, Any] = {"trials": 6, "max_new_tokens": 2, "batch_size": 16, "name": "tiny-llava"}
    return tune(*tiny, asked, target=target, **options)


def test_the_verdict_is_on_images_that_the_search_has_not_seen(report: TuningReport, asked: list[PromptSample]) -> None:
    assert set(report.search_images).isdisjoint(report.unseen_images)
    assert set(report.search_images) | set(report.unseen_images) == {sample.name for sample in asked}
    assert {one.image for one in report.search.asked} == set(report.search_images)
    assert {one.image for one in report.unseen.asked} == set(report.unseen_images)
    found = report.unseen.results[0].spec
    agreement, tokens = report.verdict()
    assert found.agreement.top1.percent() in agreement and "has not seen" in agreement
    assert f"{found.retention:.1%}" in tokens
    assert [one.spec.name for one in report.unseen.results] == ["tuned", "trio-soft-11"]


def test_the_search_measured_what_fidelity_measures(report: TuningReport) -> None:
    best, row = report.candidate(report.best), report.search.results[0].spec
    assert best.values["agreement"] == pytest.approx(row.agreement.top1.mean)
    assert best.values["flops"] == pytest.approx(row.flops)
    assert best.values["tokens"] == pytest.approx(row.retention)
    assert 0 < best.errors["agreement"] < 0.5 or best.values["agreement"] == 1.0
    assert best.kl == pytest.approx(row.agreement.kl.mean, rel=1e-3, abs=1e-6)


def test_the_spec_can_be_written_and_read(report: TuningReport, tmp_path: Path) -> None:
    spec = best_spec(report)
    file = tmp_path / "best.yaml"
    file.write_text(spec.to_yaml())
    assert load_spec(file) == spec
    assert spec.name == "tuned-tiny-llava"
    assert "not seen" in spec.description and "agreement>=60%" in spec.description
    assert report.unseen.results[0].spec.agreement.top1.percent() in spec.description
    assert report.trials == 6 and report.best in [one.trial for one in report.candidates]


def test_report_comes_back_from_json(report: TuningReport) -> None:
    assert TuningReport.from_json(report.to_json()) == report


def test_a_timed_target_measures_time(tiny: tuple[Any, Any], asked: list[PromptSample]) -> None:
    from trio.measure.answering import GreedyAnswerer

    judge = Judge(GreedyAnswerer(*tiny, max_new_tokens=1), asked[:4], batch_size=4, timed=True)
    assert judge.tokens == 144
    found = judge.judge(load_spec({"version": 1, "stages": [{"after_layer": 0, "keep": 4, "scorer": "random"}]}))
    assert found.values["speed"] > 0 and found.values["tokens"] == pytest.approx(4 / 144)
    everything = judge.judge(load_spec({"version": 1, "stages": [{"after_layer": 0, "keep": "100%"}]}))
    assert (everything.values["agreement"], everything.values["flops"], everything.kl) == (1.0, 1.0, 0.0)


def test_the_image_is_drawn(report: TuningReport, tmp_path: Path) -> None:
    file = tmp_path / "front.png"
    draw(report, file)
    with Image.open(file) as image:
        assert image.size == (1200, 750)
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    drawn = {colour for _, colour in colours}
    assert {(0, 114, 178), (213, 94, 0), (85, 85, 85)} <= drawn  # the chosen spec, the default and chance
    with pytest.raises(InputError, match="cannot be written"):
        draw(report, tmp_path / "front.nothing")


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, asked: list[PromptSample]) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for sample in asked[::2]:
        sample.load().save(images / f"{sample.name}.png")
        lines.append(json.dumps({"image": f"{sample.name}.png", "prompt": sample.prompt}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return images


def test_command(folder: Path, tmp_path: Path) -> None:
    out, plot, study = (tmp_path / name for name in ("best.yaml", "front.png", "study.log"))
    options: list[str | Path] = ["--images", folder, "--prompts", tmp_path / "prompts.jsonl", "--target", "tokens<=60%"]
    options += ["--trials", "4", "--out", out, "--plot", plot, "--study", study]
    options += ["--max-new-tokens", "2", "--batch-size", "16"]
    result = trio_("tune", "tiny-llava", *options)
    assert result.exit_code == 0, result.stderr
    assert "has not seen" in result.stdout and "unseen images" in result.stdout and "random" in result.stdout
    report = TuningReport.from_json(trio_("tune", "tiny-llava", *options, "--force", "--json").stdout)
    assert load_spec(out) == best_spec(report)
    assert plot.stat().st_size > 1000 and study.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "agreement>99%"], "this is no condition"),
        (["--out", "missing/best.yaml"], "make it first"),
        (["--images", "missing"], "there is no such folder"),
        (["--task", "shapesvqa"], "give either --images"),
    ],
)
def test_command_says_what_is_wrong(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    given = ["--images", str(folder), "--out", str(tmp_path / "best.yaml"), "--target", "flops<=90%"]
    if options[0] == "--target":
        given = given[:-2]
    result = trio_("tune", "tiny-llava", *given, *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.measured import RESULTS, block

    page = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
    assert block("tune") in page
    report = TuningReport.from_json((RESULTS / "tune-tiny-llava.json").read_text())
    assert f'--target "{report.target}" --trials {report.trials}' in page
    assert (ROOT / "docs" / "tune-tiny-llava.png").is_file()
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code[1].replace("scenes=4", "scenes=2"), "docs/tune.md", "exec"), names)
    assert names["pipeline"].spec == names["spec"]
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["name"].startswith("tuned-")
