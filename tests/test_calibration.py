"""Calibration: the drop-all curve, the rule that places stages, the choice, and the verdict on unseen images."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import trio
from trio import zoo
from trio.cli import app
from trio.errors import InputError, SpecError
from trio.measure.answering import generate
from trio.measure.calibration import CalibrationReport, DropAllCurve, absorption, calibrate, drop_all_curve
from trio.measure.calibration.calibrate import budget_share, verdict_of
from trio.measure.calibration.placement import EVEN, Placement, candidates, placed, shares
from trio.measure.fidelity import PromptSample
from trio.measure.shapesvqa.examples import examples
from trio.measure.statistics import Estimate
from trio.spec import load_spec
from trio.spec.schedule import resolve

ROOT = Path(trio.__file__).parent.parent
DEFAULT = load_spec(trio.DEFAULT_SPEC)
EARLY = absorption([4.0, 1.5, 0.6, 0.2, 0.1, 0.05, 0.0, 0.0, 0.0])
LATE = absorption([4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 1.5, 0.5, 0.0])


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# The rule ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12))
def test_absorption_never_falls(divergence: list[float]) -> None:
    found = absorption(divergence)
    assert found[0] == 0 and found[-1] == pytest.approx(1)
    assert all(later >= earlier for earlier, later in pairwise(found))


def test_absorption() -> None:
    assert absorption([4.0, 1.0, 2.0, 0.0]) == pytest.approx([0.0, 0.625, 0.625, 1.0])
    assert absorption([0.0, 0.0, 0.0]) == [0.0, 0.5, 1.0]  # nothing is taken in: no layer is above another
    assert absorption([0.1, 0.4, 0.0]) == pytest.approx([0.0, 0.0, 1.0])


def loss(absorbed: list[float], kept: list[float]) -> float:
    """What the rule says a schedule loses, layer by layer; `kept`: the share in each layer."""
    depth = len(kept)
    taken = [(1 - EVEN) * (b - a) + EVEN / depth for a, b in pairwise(absorbed)]
    return sum(part / share for part, share in zip(taken, kept, strict=True))


def by_layer(layers: tuple[int, ...], kept: tuple[float, ...], depth: int) -> list[float]:
    ends = [*layers, depth]
    return [1.0] * layers[0] + [share for share, (a, b) in zip(kept, pairwise(ends), strict=True) for _ in range(a, b)]


@given(
    st.lists(st.floats(0.01, 5), min_size=8, max_size=8),
    st.floats(0.001, 1),
    st.sampled_from([0.111, 0.222, 0.4]),
)
def test_no_schedule_of_the_budget_loses_less(falls: list[float], ratio: float, budget: float) -> None:
    """Against two stages anywhere with the same mean, the second of which keeps any share of what reaches it."""
    absorbed = absorption([*np.cumsum(falls[::-1])[::-1].tolist(), 0.0])
    found = {one.name: one for one in candidates(absorbed, budget, range(8))}
    best = found.get("two-by-curve", found["input"])
    kept = shares(absorbed, best.layers, budget)
    assert kept is not None
    mine = by_layer(best.layers, kept, 8)
    assert np.mean(mine) == pytest.approx(budget)
    for first, second in combinations(range(8), 2):
        top = (budget * 8 - first) / (second - first + (8 - second) * ratio)
        if 0 < top <= 1:
            theirs = by_layer((first, second), (top, top * ratio), 8)
            assert np.mean(theirs) == pytest.approx(budget)
            assert loss(absorbed, mine) <= loss(absorbed, theirs) * (1 + 1e-9)


def test_an_image_that_is_taken_in_early_is_kept_early() -> None:
    early = {one.name: one for one in candidates(EARLY, 0.111, range(8))}
    kept = shares(EARLY, early["three-by-curve"].layers, 0.111)
    assert kept is not None and len(kept) == 3 and kept[0] > 3 * kept[2]
    assert early["three-by-curve"].layers[-1] <= 4  # the little that is taken in later needs few tokens
    late = {one.name: one for one in candidates(LATE, 0.111, range(8))}
    assert set(late) == {
        "input",
        "published",
    }  # tokens do not come back: what is needed late has to be kept from the start
    assert late["input"].layers == (0,)


@pytest.mark.parametrize("layers", [8, 28, 32])
@pytest.mark.parametrize("budget", ["11%", "22.2%", "50%"])
def test_candidates_meet_the_budget(layers: int, budget: str) -> None:
    fall = [math.exp(-6 * depth / layers) for depth in range(layers)]
    made = candidates(absorption([*fall, 0.0]), budget_share(budget), range(layers == 32, layers))
    assert 2 <= len(made) <= 4 and len({one.layers for one in made}) > 1
    for one in made:
        spec = one.spec(DEFAULT, budget)
        average = resolve(spec, layers).average(576)
        assert average == pytest.approx(576 * budget_share(budget), abs=0.5)
        assert spec.stages[0].selector == DEFAULT.stages[0].selector
        assert all(stage.selector == DEFAULT.stages[1].selector for stage in spec.stages[1:])
        assert load_spec(spec.to_dict()) == spec


def test_published_places() -> None:
    found = {one.name: one for one in candidates(EARLY, 0.111, range(8))}
    released = resolve(load_spec("trio-11"), 8)
    assert found["published"].layers == released.layers
    spec = found["published"].spec(DEFAULT, "11.1%")
    assert resolve(spec, 8).counts(144) == released.counts(144)


def test_a_budget_leaves_no_late_first_stage() -> None:
    assert shares(EARLY, (1, 4), 0.111) is None  # all tokens in one layer of eight are more than 11.1%
    assert [one.name for one in candidates(EARLY, 0.111, [2, 3])] == []


def test_counts_become_ratios() -> None:
    given_ = resolve(load_spec("trio-llava-1.5-64"), 32)
    one = placed("published", given_, 576)
    assert one.layers == (1, 10, 15) and one.ratios == pytest.approx((54 / 92, 22 / 54))
    again = resolve(one.spec(load_spec("trio-llava-1.5-64"), "11.1%"), 32)
    assert again.average(576) == pytest.approx(given_.average(576), abs=0.6)
    nothing = load_spec({"version": 1, "stages": [{"after_layer": 2, "keep": 0}]})
    with pytest.raises(SpecError, match="leaves no token of 576"):
        placed("none", resolve(nothing, 32), 576)


# The curve -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def asked() -> list[PromptSample]:
    return [PromptSample(e.image, e.question, f"scene {e.scene}") for e in examples("validation", 6, 4)][::2]


@pytest.fixture(scope="module")
def curve(tiny: tuple[Any, Any], asked: list[PromptSample]) -> DropAllCurve:
    return drop_all_curve(*tiny, asked, max_new_tokens=4, batch_size=5, name="tiny-llava")


def blinded(model: Any, processor: Any, sample: PromptSample, depth: int) -> tuple[float, float]:
    """Mean KL and agreement along the full answer, where a mask hides the image from the text from a layer on.

    Stock modules, one pass over prompt and answer without a cache, no pipeline.
    """
    from trio.core.images import inputs_for

    inputs = inputs_for(processor, *sample.question())
    prompt = inputs["input_ids"]
    answer = generate(model, inputs, max_new_tokens=4)[0]
    ends = (answer == model.generation_config.eos_token_id).nonzero()
    answer = answer[: int(ends[0]) + 1] if len(ends) else answer
    whole = torch.cat([prompt, answer[None]], 1)
    visual = whole[0] == model.config.image_token_id
    length = whole.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    hidden = mask.masked_fill(visual[None] & ~visual[:, None], float("-inf"))

    def logits(first: int) -> torch.Tensor:
        def swap(layer: int) -> Any:
            shown = (mask if layer < first else hidden)[None, None]
            return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": shown})

        layers = model.model.language_model.layers
        handles = [one.register_forward_pre_hook(swap(i), with_kwargs=True) for i, one in enumerate(layers)]
        try:
            with torch.no_grad():
                given_ = {"input_ids": whole, "pixel_values": inputs["pixel_values"], "use_cache": False}
                out = model(**given_).logits[0, prompt.shape[1] - 1 : -1]
        finally:
            for handle in handles:
                handle.remove()
        return out.double().log_softmax(-1)

    full, other = logits(len(model.model.language_model.layers)), logits(depth)
    assert full.argmax(-1).tolist() == answer.tolist()  # the answer is the full model's own
    kl = (full.exp() * (full - other)).sum(-1)
    return float(kl.mean()), float((full.argmax(-1) == other.argmax(-1)).double().mean())


def test_the_curve_is_that_of_a_masked_model(
    tiny: tuple[Any, Any], asked: list[PromptSample], curve: DropAllCurve
) -> None:
    for depth in (0, 3, 6):
        found = [blinded(*tiny, sample, depth) for sample in asked]
        point = curve.points[depth]
        assert point.kl.mean == pytest.approx(np.mean([kl for kl, _ in found]), abs=1e-4)
        assert point.top1.mean == pytest.approx(np.mean([same for _, same in found]))


def test_the_curve_ends_at_the_full_model(curve: DropAllCurve, asked: list[PromptSample]) -> None:
    assert [point.depth for point in curve.points] == list(range(9))
    assert (curve.points[-1].kl.mean, curve.points[-1].top1.mean) == (0.0, 1.0)
    assert curve.points[0].kl.mean > 0.5 and curve.points[0].top1.mean < 0.8
    assert curve.absorbed[0] == 0.0 and curve.absorbed[-1] == 1.0
    assert all(later >= earlier for earlier, later in pairwise(curve.absorbed))
    for point in curve.points:
        assert point.kl.low <= point.kl.mean <= point.kl.high
    assert (curve.samples, curve.images) == (len(asked), len({sample.name for sample in asked}))
    assert curve.visual_tokens == 144
    assert any("too few for intervals" in note for note in curve.notes)
    assert DropAllCurve.from_json(curve.to_json()) == curve


def test_batches_change_nothing(tiny: tuple[Any, Any], asked: list[PromptSample], curve: DropAllCurve) -> None:
    alone = drop_all_curve(*tiny, asked, max_new_tokens=4, batch_size=1, name="tiny-llava")
    assert [p.kl.mean for p in alone.points] == pytest.approx([p.kl.mean for p in curve.points], abs=1e-4)
    assert alone.positions == curve.positions


@pytest.mark.parametrize("model", ["tiny-qwen2.5-vl", "tiny-llava-next"])
def test_other_families(model: str) -> None:
    """Positions with rows and columns, images of many sizes, tiles with newlines between their rows."""
    some = [PromptSample(e.image, e.question, f"scene {e.scene}") for e in examples("test", 2, 1, varied=True)][:3]
    found = drop_all_curve(*zoo.load(model), some, max_new_tokens=3, batch_size=3)
    kls = [point.kl.mean for point in found.points]
    assert kls[0] > 0.1 and kls[0] > 10 * kls[-2]  # the last layer takes in nearly nothing
    assert found.points[0].top1.mean < 1


def test_prompts_that_need_no_image_are_said(tiny: tuple[Any, Any]) -> None:
    image = examples("validation", 6, 1)[0].image.copy()
    image.paste((128, 128, 128), (0, 0, *image.size))
    samples = [PromptSample(image, "is there a red circle?", str(number)) for number in range(2)]
    found = drop_all_curve(*tiny, samples, max_new_tokens=2, batch_size=2)
    assert (found.points[0].kl.mean < 0.01) == any("hardly need" in note for note in found.notes)


# Calibration ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny: tuple[Any, Any], asked: list[PromptSample]) -> CalibrationReport:
    return calibrate(*tiny, asked, budget="11%", max_new_tokens=4, batch_size=16, name="zoo/tiny-llava")


def test_the_verdict_is_on_images_that_had_no_part(report: CalibrationReport, asked: list[PromptSample]) -> None:
    assert set(report.calibration_images).isdisjoint(report.unseen_images)
    assert {*report.calibration_images, *report.unseen_images} == {sample.name for sample in asked}
    assert report.curve.images == len(report.calibration_images)
    assert report.rows[-1].name == report.shipped == "trio-soft-11 at 11%"
    assert 3 <= len(report.rows) <= 5
    assert report.chosen == min(report.rows, key=lambda row: (row.kl.high, row.kl.mean)).name
    names = [row.name for row in report.unseen]
    assert names[:2] == [report.chosen, f"{report.chosen}, random"] and (report.chosen == report.shipped) == (
        len(names) == 2
    )


def test_every_schedule_costs_the_same(report: CalibrationReport) -> None:
    for row in [*report.rows, *report.unseen]:
        assert row.retention == pytest.approx(0.11, abs=0.5 / 144)
        assert row.flops is not None and 0 < row.flops < 1
        assert resolve(DEFAULT, 8).layers != row.layers or row.name.startswith("trio-soft")
    assert report.against_random.kl.mean < 0  # the parts do better than chance even on a few images


def test_differences_are_those_of_the_rows(report: CalibrationReport) -> None:
    rows = {row.name: row for row in report.unseen}
    for one in (report.against_random, report.against_shipped):
        if one.verdict != "the same":
            assert one.kl.mean == pytest.approx(rows[report.chosen].kl.mean - rows[one.other].kl.mean, abs=1e-9)
            assert one.verdict == verdict_of(one.kl)


def test_the_file_has_spec_verdict_and_curve(report: CalibrationReport, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(report.file())
    spec = load_spec(file)
    assert spec == report.pipeline_spec() and spec.name == "calibrated-tiny-llava"
    row = next(row for row in report.rows if row.name == report.wrote)
    assert resolve(spec, 8).layers == tuple(row.layers) and list(resolve(spec, 8).stage_counts(144)) == row.kept
    head = [line for line in file.read_text().split("\n") if line.startswith("#")]
    assert all(f"# {line}" in head for line in report.verdict())
    assert f"0: {report.curve.points[0].kl.mean:.3f}" in head[-1]
    assert CalibrationReport.from_json(report.to_json()) == report


def test_names_steer_no_file(report: CalibrationReport) -> None:
    odd = report.model_copy(update={"model": "a\nstages: []\n\x1b[2J"})
    assert odd.file().split("\n")[0].startswith("# trio calibrate a\\nstages: []\\n\\x1b[2J,")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.2, -0.1, "better"), (-0.2, 0.1, "not told apart"), (0.1, 0.2, "worse"), (0.0, 0.0, "not told apart")],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert verdict_of(Estimate(mean=(low + high) / 2, low=low, high=high)) == verdict


@pytest.mark.parametrize("even_if_worse", [False, True])
def test_what_is_worse_is_not_written(
    tiny: tuple[Any, Any], asked: list[PromptSample], monkeypatch: pytest.MonkeyPatch, even_if_worse: bool
) -> None:
    place = sys.modules["trio.measure.calibration.calibrate"]
    monkeypatch.setattr(place, "candidates", lambda *_: [Placement("input", (0,), ())])
    monkeypatch.setattr(place, "verdict_of", lambda difference: "worse")
    monkeypatch.setattr(place, "_best", lambda asker, tried: tried[0])
    found = calibrate(
        *tiny, asked[:8], budget="22.2%", max_new_tokens=2, batch_size=16, even_if_worse=even_if_worse, name="x"
    )
    assert found.chosen == "input" and found.shipped == "trio-soft-22"
    layers = resolve(found.pipeline_spec(), 8).layers
    assert layers == ((0,) if even_if_worse else resolve(load_spec("trio-soft-22"), 8).layers)
    said = "\n".join(found.verdict())
    assert ("although it is worse" in said) == even_if_worse and ("keep trio-soft-22" in said) != even_if_worse


def test_another_base(tiny: tuple[Any, Any], asked: list[PromptSample]) -> None:
    """Its scorer looks at a layer that has run, and its counts become ratios."""
    stages = [{"after_layer": 1, "keep": 60, "scorer": "last-token-attention", "selector": "top-k"}]
    stages.append({**stages[0], "after_layer": 4, "keep": 30})
    base = {"version": 1, "name": "mine", "stages": stages}
    found = calibrate(*tiny, asked[:8], base=base, budget="30%", max_new_tokens=2, batch_size=16)
    assert found.shipped == "mine at 30%"
    assert all(row.layers[0] >= 1 for row in found.rows)
    assert any("no stage after layer 0" in note for note in found.notes)
    assert all(stage.scorer.name == "last-token-attention" for stage in found.pipeline_spec().stages)
    assert found.rows[-1].kept[1] == pytest.approx(found.rows[-1].kept[0] / 2, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "11"}, "budget: found '11'"),
        ({"budget": "100%"}, "budget: found '100%'"),
        ({"base": {"version": 1, "compressor": {"name": "random", "keep": 9}}}, "found compressor"),
        ({"base": {"version": 1, "resize": "50%", "stages": [{"after_layer": 1, "keep": 9}]}}, "found resize"),
        ({"held_out": 1.0}, "held_out"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
    ],
)
def test_wrong_arguments(
    tiny: tuple[Any, Any], asked: list[PromptSample], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, SpecError), match=re.escape(message)):
        calibrate(*tiny, [asked[0], asked[-1]], **{"max_new_tokens": 2, **options})
    with pytest.raises(InputError, match="samples: there is none"):
        drop_all_curve(*tiny, [])


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
    out = tmp_path / "my.yaml"
    options: list[str | Path] = ["--images", folder, "--prompts", tmp_path / "prompts.jsonl", "--budget", "11%"]
    options += ["--out", out, "--max-new-tokens", "2", "--batch-size", "16"]
    result = trio_("calibrate", "tiny-llava", *options)
    assert result.exit_code == 0, result.stderr
    for said in ("unseen images", "taken in up to here", "random", "trio-soft-11 at 11%", f"written: {out}"):
        assert said in result.stdout
    report = CalibrationReport.from_json(trio_("calibrate", "tiny-llava", *options, "--force", "--json").stdout)
    assert out.read_text() == report.file()
    assert load_spec(out) == report.pipeline_spec()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "11"], "budget: found '11'"),
        (["--out", "missing/my.yaml"], "make it first"),
        (["--images", "missing"], "there is no such folder"),
        (["--task", "shapesvqa"], "give either --images"),
        (["--base", "visionzip-llava-1.5-64"], "found compressor; calibration places stages"),
        (["--base", "trio-soft-12"], "there is no shipped spec"),
    ],
)
def test_command_says_what_is_wrong(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    given_ = ["--images", str(folder), "--out", str(tmp_path / "my.yaml")]
    result = trio_("calibrate", "tiny-llava", *given_, *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.measured import block

    page = (ROOT / "docs" / "calibrate.md").read_text(encoding="utf-8")
    assert block("calibrate") in page and block("curves") in page
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code[1].replace("scenes=4", "scenes=2"), "docs/calibrate.md", "exec"), names)
    assert names["pipeline"].spec == names["report"].pipeline_spec()
