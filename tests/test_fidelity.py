"""Fidelity: what counts as alike, its intervals, its floor, and the command that measures it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import trio
from trio import zoo
from trio.cli import app
from trio.errors import InputError, TrioError
from trio.measure.fidelity import DESCRIBE, FidelityReport, PromptSample, measure, read_samples
from trio.measure.fidelity.compare import compare, edit_similarity
from trio.measure.fidelity.floor import random_floor
from trio.measure.fidelity.positions import PositionFidelity, Positions
from trio.measure.shapesvqa.examples import examples
from trio.measure.statistics import Bootstrap
from trio.measure.teacher import PositionAgreement
from trio.spec import load_spec

ROOT = Path(trio.__file__).parent.parent
EVERYTHING = {"version": 1, "name": "everything", "stages": [{"after_layer": 0, "keep": "100%"}]}


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module")
def asked() -> list[PromptSample]:
    return [PromptSample(e.image, e.question, f"scene {e.scene}") for e in examples("validation", 5, 3)][:14]


@pytest.fixture(scope="module")
def report(tiny: tuple[Any, Any], asked: list[PromptSample]) -> FidelityReport:
    harsh = {"version": 1, "name": "trio-11", "stages": [{"after_layer": 0, "keep": 2}]}
    return measure(*tiny, [EVERYTHING, "trio-11", harsh], asked, max_new_tokens=4, batch_size=6)


# What counts as alike ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("", "", 1.0),
        ("a", "", 0.0),
        ("red circle", "red circle", 1.0),
        ("kitten", "sitting", 1 - 3 / 7),
        ("flaw", "lawn", 0.5),
        ("abc", "xyz", 0.0),
    ],
)
def test_edit_similarity(one: str, two: str, expected: float) -> None:
    assert edit_similarity(one, two) == edit_similarity(two, one) == pytest.approx(expected)


def test_compare() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    alike, other = compare(logits, torch.tensor([[2.0, 1.0], [1.0, 0.0]]), ["red", "blue"], ["red", "glue"])
    assert (alike.top1, alike.kl, alike.exact, alike.edit) == (True, 0.0, True, 1.0)
    assert not other.top1 and not other.exact
    assert other.kl == pytest.approx((math.e - 1) / (math.e + 1))
    assert other.edit == 0.75


# Intervals -----------------------------------------------------------------------------------------------------------


def test_shares_with_one_prompt_an_image_are_wilson_s() -> None:
    found = Bootstrap(range(10), one_by_one=True).share([1.0] * 8 + [0.0] * 2)
    assert found.method == "wilson"
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_intervals_draw_the_prompts_of_an_image_together() -> None:
    values = [float(i % 2) for i in range(20) for _ in range(10)]  # within an image all alike
    together = Bootstrap([i // 10 for i in range(200)]).share(values)
    apart = Bootstrap(range(200)).number(values)
    assert together.method == apart.method == "bootstrap"
    assert together.high - together.low > 2.5 * (apart.high - apart.low)


def test_full_agreement_still_has_an_interval() -> None:
    found = Bootstrap([i // 3 for i in range(30)]).share([1.0] * 30)  # ten images, not thirty samples
    assert found.method == "wilson"
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-3)


# The floor -----------------------------------------------------------------------------------------------------------


def test_floor_changes_the_parts_and_nothing_else() -> None:
    spec = load_spec("trio-11")
    floor = random_floor(spec, seed=3)
    assert floor.name == "trio-11, random"
    for stage, random in zip(spec.stages, floor.stages, strict=True):
        assert (random.after_layer, random.keep, random.if_fewer) == (stage.after_layer, stage.keep, stage.if_fewer)
        assert random.scorer.as_mapping() == {"name": "random", "seed": 3}
        assert random.selector.name == "top-k"
    assert floor.budget == spec.budget
    load_spec(floor)  # its parts exist


def test_floor_of_a_compressor() -> None:
    spec = load_spec({"version": 1, "compressor": {"name": "visionzip", "keep": 64}})
    floor = random_floor(spec, seed=1).compressor
    assert floor is not None and spec.compressor is not None
    assert (floor.as_mapping(), floor.keep) == ({"name": "random", "seed": 1}, spec.compressor.keep)
    decides = load_spec({"version": 1, "compressor": "visionzip"}, check_parts=False)
    floor = random_floor(decides, entered=0.25).compressor
    assert floor is not None and floor.keep.share == "25%"


# Measuring -----------------------------------------------------------------------------------------------------------


def test_a_spec_that_drops_nothing_changes_nothing(report: FidelityReport) -> None:
    row = report.results[0].spec
    found = row.agreement
    assert (found.top1.mean, found.kl.mean, found.exact.mean, found.edit.mean) == (1.0, 0.0, 1.0, 1.0)
    assert row.average_kept == row.visual_tokens == 144
    assert row.retention == row.flops == 1.0


def test_floor_keeps_as_many_tokens(report: FidelityReport) -> None:
    for result in report.results:
        assert result.floor.average_kept == pytest.approx(result.spec.average_kept)
        assert result.floor.visual_tokens == result.spec.visual_tokens
    assert report.results[1].spec.average_kept == pytest.approx(16, abs=0.5)
    assert report.results[2].spec.average_kept == 2


def test_two_specs_of_one_name_are_told_apart(report: FidelityReport) -> None:
    assert [row.name for row in report.rows()] == [
        f"{spec}{end}" for spec in ("everything", "trio-11", "trio-11 (2)") for end in ("", ", random", ", equal cost")
    ]


def test_pooled_tokens_of_equal_cost_stand_beside_a_spec(report: FidelityReport) -> None:
    for result in report.results:
        equal = result.equal_cost
        assert equal is not None and equal.flops is not None and result.spec.flops is not None
        assert 0 <= result.spec.flops - equal.flops < 0.006  # a pooled token of 144 is less than that
        assert equal.spec is not None and equal.spec["compressor"]["name"] == "average-pool"
        assert result.equal_gain is not None
        gained = result.spec.agreement.top1.mean - equal.agreement.top1.mean
        assert result.equal_gain.top1.mean == pytest.approx(gained)


def test_numbers_come_from_the_answers_in_the_report(report: FidelityReport, asked: list[PromptSample]) -> None:
    assert report.samples == len(asked) == 14
    assert report.images == len({sample.name for sample in asked})
    for row in report.rows():
        same = [one.answers[row.name] == one.full for one in report.asked]
        assert row.agreement.exact.mean == pytest.approx(sum(same) / 14)
        top1 = [one.top1[row.name] for one in report.asked]
        assert row.agreement.top1.mean == pytest.approx(sum(top1) / 14)
        assert row.agreement.kl.mean == pytest.approx(sum(one.kl[row.name] for one in report.asked) / 14)
        edits = [edit_similarity(one.full, one.answers[row.name]) for one in report.asked]
        assert row.agreement.edit.mean == pytest.approx(sum(edits) / 14)
    for result in report.results:
        spec, floor = result.spec.agreement, result.floor.agreement
        assert result.gain.top1.mean == pytest.approx(spec.top1.mean - floor.top1.mean)
        assert result.gain.kl.mean == pytest.approx(spec.kl.mean - floor.kl.mean)
    assert report.results[2].spec.agreement.kl.mean > report.results[1].spec.agreement.kl.mean > 0


def test_positions_are_those_of_the_full_model_s_answers(
    report: FidelityReport, tiny: tuple[Any, Any], asked: list[PromptSample]
) -> None:
    """Against each prompt alone, forced token by token, whether or not its free answer was the full model's."""
    from trio.core.images import inputs_for
    from trio.measure.teacher import greedy_answer, teacher_forced

    model, processor = tiny
    with_another_answer = [i for i, one in enumerate(report.asked) if one.answers["trio-11 (2)"] != one.full]
    assert 0 < len(with_another_answer) < 14
    pipeline = trio.Pipeline.from_spec({"version": 1, "stages": [{"after_layer": 0, "keep": 2}]}, model)
    for index in (with_another_answer[0], *(i for i in range(14) if i not in with_another_answer[:1])):
        inputs = inputs_for(processor, [asked[index].load()], asked[index].prompt)
        full = greedy_answer(model, inputs, max_new_tokens=4)
        expected = teacher_forced(model, inputs, full, pipeline)[0]
        found = report.asked[index]
        assert len(found.position_kl["trio-11 (2)"]) == full.lengths[0]
        assert found.position_kl["trio-11 (2)"] == pytest.approx(expected.kl, rel=1e-2, abs=1e-4)
        assert found.position_kl["everything"] == [0.0] * full.lengths[0]
        assert found.position_top1["everything"] == [True] * full.lengths[0]


def test_places_come_from_the_positions_in_the_report(report: FidelityReport) -> None:
    assert report.results[0].spec.positions is not None
    for row in report.rows():
        assert row.positions is not None
        top1 = [one.position_top1[row.name] for one in report.asked]
        kl_ = [one.position_kl[row.name] for one in report.asked]
        flat = [nats for one in kl_ for nats in one]
        overall, buckets = row.positions.overall, row.positions.buckets
        assert overall.tokens == len(flat) > 14 and overall.kl.mean == pytest.approx(sum(flat) / len(flat))
        assert overall.top1.mean == pytest.approx(sum(map(sum, top1)) / len(flat))
        assert [one.name for one in buckets] == ["token 1", "tokens 2 to 4"]  # four tokens at most
        assert (buckets[0].kl.mean, buckets[0].top1.mean) == pytest.approx(
            (row.agreement.kl.mean, row.agreement.top1.mean), rel=1e-6
        )
        behind = [nats for one in kl_ for nats in one[1:4]]
        assert buckets[1].kl.mean == pytest.approx(sum(behind) / len(behind))
        third = [one[2] for one in kl_ if len(one) > 2]
        assert row.positions.by_position[2].kl.mean == pytest.approx(sum(third) / len(third))
        assert row.positions.worst.kl.mean == max(one.kl.mean for one in buckets)
        assert overall.kl.low <= overall.kl.mean <= overall.kl.high


def test_positions_of_an_image_are_drawn_together() -> None:
    def half(images: list[str]) -> PositionFidelity:
        agreements = [PositionAgreement((i % 2 == 0,) * 3, (float(i % 2),) * 3) for i in range(20)]
        return Positions([3] * 20, images).summarised(agreements)

    alone, pairs = half([str(i) for i in range(20)]), half([str(i % 4) for i in range(20)])
    assert (alone.overall.images, pairs.overall.images) == (20, 4)
    assert alone.overall.tokens == pairs.overall.tokens == 60
    assert pairs.overall.kl.high - pairs.overall.kl.low > 1.5 * (alone.overall.kl.high - alone.overall.kl.low)
    assert alone.overall.kl.mean == alone.overall.top1.mean == 0.5


def test_buckets_end_where_answers_do() -> None:
    agreements = [PositionAgreement((True,) * 9 + (False,), (0.0,) * 9 + (2.0,)), PositionAgreement((True,), (0.5,))]
    found = Positions([10, 1], ["a", "b"]).summarised(agreements)
    assert [(one.name, one.tokens, one.images) for one in found.buckets] == [
        ("token 1", 2, 2),
        ("tokens 2 to 4", 3, 1),
        ("tokens 5 to 8", 4, 1),
        ("token 9 on", 2, 1),
    ]
    assert found.worst.name == "token 9 on" and found.worst.kl.mean == 1.0 and found.worst.top1.mean == 0.5
    assert len(found.by_position) == 10 and found.by_position[9].kl.mean == 2.0


def test_a_model_that_cannot_be_forced_is_measured_without_positions(
    tiny: tuple[Any, Any], asked: list[PromptSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    free = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: free(**{**given, "logits_processor": []}))
    harsh = {"version": 1, "name": "harsh", "stages": [{"after_layer": 0, "keep": 1}]}
    found = measure(model, processor, harsh, asked[:6], max_new_tokens=2, batch_size=3)
    assert all(row.positions is None for row in found.rows())
    assert any("not compared at every position" in note for note in found.notes)
    assert found.asked[0].position_kl == {} and found.samples == 6


def test_the_answers_are_the_model_s_own(
    report: FidelityReport, tiny: tuple[Any, Any], asked: list[PromptSample]
) -> None:
    from trio.core.images import inputs_for

    model, processor = tiny
    sample = asked[9]
    inputs = inputs_for(processor, [sample.load()], sample.prompt)
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
        with trio.Pipeline.from_spec("trio-11", model):
            other = model(**inputs).logits[:, -1]
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    log_p, log_q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    divergence = float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert report.asked[9].answers["trio-11"] == answer
    assert report.asked[9].kl["trio-11"] == pytest.approx(divergence, rel=1e-2, abs=1e-5)


def test_times_are_measured_of_every_row(report: FidelityReport) -> None:
    assert 0 < report.full.first_token <= report.full.answer
    for row in report.rows():
        assert 0 < row.seconds.first_token <= row.seconds.answer
        assert row.speedup.first_token > 0 and row.speedup.answer > 0


def test_report_comes_back_from_json(report: FidelityReport) -> None:
    assert FidelityReport.from_json(report.to_json()) == report
    summary = report.summary()
    assert "14 prompts on 3 images" in summary or f"{report.images} images" in summary
    assert "trio-11, random" in summary and "too few" in summary


def test_nothing_is_left_on_the_model(tiny: tuple[Any, Any], asked: list[PromptSample]) -> None:
    model, processor = tiny
    before = [len(module._forward_hooks) for module in model.modules()]
    told: list[tuple[int, int]] = []
    steps = lambda done, total: told.append((done, total))  # noqa: E731
    measure(model, processor, "trio-11", asked[:3], max_new_tokens=1, batch_size=2, progress=steps)
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_wrong_arguments(tiny: tuple[Any, Any], asked: list[PromptSample]) -> None:
    for bad, message in (
        ({"samples": []}, "samples: there is none"),
        ({"specs": []}, "specs: there is none"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
    ):
        given: dict[str, Any] = {"specs": "trio-11", "samples": asked, **bad}
        with pytest.raises(InputError, match=message):
            measure(*tiny, given.pop("specs"), given.pop("samples"), **given)
    model, processor = tiny
    model.train()
    try:
        with pytest.raises(InputError, match=r"model\.eval"):
            measure(model, processor, "trio-11", asked)
    finally:
        model.eval()


# Samples from files --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(["b.png", "a.jpg", "c.webp"]):
        Image.new("RGB", (168, 168), (40 * number, 200, 30)).save(images / name)
    (images / "notes.txt").write_text("no image")
    return images


def test_every_prompt_for_every_image(folder: Path, tmp_path: Path) -> None:
    assert [(one.name, one.prompt) for one in read_samples(folder)] == [
        ("a.jpg", DESCRIBE),
        ("b.png", DESCRIBE),
        ("c.webp", DESCRIBE),
    ]
    lines = tmp_path / "prompts.txt"
    lines.write_text("what is it ?\n\nwhat colour ?\n")
    found = read_samples(folder, lines, limit=2)
    expected = itertools.product(["a.jpg", "b.png"], ["what is it ?", "what colour ?"])
    assert [(one.name, one.prompt) for one in found] == list(expected)
    assert found[0].load().size == (168, 168)


def test_pairs_from_json_lines(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    pairs = [("c.webp", "one ?"), ("a.jpg", "two ?"), ("c.webp", "three ?")]
    file.write_text("\n".join(json.dumps({"image": image, "prompt": text, "answer": "x"}) for image, text in pairs))
    assert [(one.name, one.prompt) for one in read_samples(folder, file)] == pairs
    assert [one.prompt for one in read_samples(folder, file, limit=1)] == ["one ?", "three ?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: no JSON"),
        ('{"image": "a.jpg"}', "line 1: 'prompt' is missing"),
        ('{"image": "a.jpg", "prompt": 3}', "line 1: 'prompt': found 3"),
        ('{"image": "a.jpg", "prompt": "x"}\n{"image": "z.png", "prompt": "x"}', "line 2: there is no image"),
        ('{"image": "a.jpg", "prompt": " "}', "an empty one"),
        ("", "there is none"),
    ],
)
def test_wrong_json_lines(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_samples(folder, file)


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    for images, prompts, message in (
        (tmp_path / "missing", None, "there is no such folder"),
        (tmp_path / "empty", None, "no image in this folder"),
        (folder, tmp_path / "missing.txt", "cannot be read .*No such file"),
        (folder, tmp_path / "empty.txt", "the file is empty"),
    ):
        with pytest.raises(InputError, match=message):
            read_samples(images, prompts)
    (folder / "broken.png").write_bytes(b"no image at all")
    with pytest.raises(InputError, match=r"broken\.png.*not an image"):
        read_samples(folder)


# The command ---------------------------------------------------------------------------------------------------------


def test_command(folder: Path, tmp_path: Path) -> None:
    for number, example in enumerate(examples("validation", 2, 2)[::8]):
        example.image.save(folder / f"scene-{number}.png")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("how many circles ?\n")
    spec = tmp_path / "mine.yaml"
    spec.write_text('version: 1\nname: mine\nstages: [{after_layer: "25%", keep: 12}]\n')
    options = ["--prompts", prompts, "--spec", "trio-11", "--spec", spec, "--out", out, "--max-new-tokens", "2"]
    options += ["--plot", tmp_path / "plot.svg"]
    result = trio_("fidelity", "tiny-llava", "--images", folder, *options)
    assert result.exit_code == 0, result.stderr
    assert "mine" in result.stdout and "every token" in result.stdout and "95% interval" in result.stdout
    found = FidelityReport.from_json(out.read_text())
    assert found.samples == found.images == 5
    assert [one.spec.name for one in found.results] == ["trio-11", "mine"]
    assert found.model == "tiny-llava"
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in ("mine", "mine, random", "trio-11", "token of the answer"))
    result = trio_("fidelity", "tiny-llava", "--images", folder, "--limit", 1, "--max-new-tokens", 1, "--json")
    printed = FidelityReport.from_json(result.stdout)  # one object and nothing else
    assert printed.images == 1 and [one.spec.name for one in printed.results] == [trio.DEFAULT_SPEC]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--spec", "trio-12"], "there is no shipped spec 'trio-12'"),
        (["--out", "missing/out.json"], "make it first"),
        (["--prompts", "missing.txt"], "cannot be read (No such file or directory)"),
    ],
)
def test_command_says_what_is_wrong(folder: Path, options: list[str], message: str) -> None:
    result = trio_("fidelity", "tiny-llava", "--images", folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


def test_a_spec_that_does_not_fit_is_refused_before_anything_runs(
    tiny: tuple[Any, Any], asked: list[PromptSample]
) -> None:
    spec = {"version": 1, "stages": [{"after_layer": 40, "keep": 3}]}
    with pytest.raises(TrioError, match="40"):
        measure(*tiny, spec, asked)


# The page ------------------------------------------------------------------------------------------------------------


def test_what_is_still_repeated_is_counted() -> None:
    from benchmarks.reuse import COUNTED, RESULT, repeated

    data = json.loads(RESULT.read_text())
    assert {name: data["repeated"][name] for name in COUNTED} == {name: repeated(name) for name in COUNTED}
    assert all(found["processor"][0] > 1 for found in data["models"].values())  # every quartile of the pairs


def test_the_page_shows_the_committed_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.measured import block

    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert all(block(name) in page for name in ("fidelity", "fidelity-long", "reuse"))
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["name"] == "attention-15"  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    steps, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(steps, "docs/fidelity.md", "exec"), {})
    names: dict[str, Any] = {}
    exec(compile(example.replace("scenes=40", "scenes=3"), "docs/fidelity.md", "exec"), names)
    assert names["report"].images == 2
