"""Images resized in front of the processor: how many tokens are reached, who sees it, and where it is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import trio
from trio import zoo
from trio.adapters import adapter_for
from trio.batch import RowAnswerer
from trio.batch.rows import BatchRow
from trio.cli import app
from trio.core.images import batch_for
from trio.core.upstream import patch_processor
from trio.cost import of_report, predict, published_shape, shape_of
from trio.encoders.resizing import resized_size
from trio.measure import evaluation
from trio.measure.answering import GreedyAnswerer
from trio.measure.bench import BenchSettings, ImagePrompts, NoisePrompts, architecture, config_of
from trio.measure.bench import measure as bench
from trio.measure.evaluation import figures, wording
from trio.measure.evaluation.figures import cost_curve
from trio.measure.evaluation.results import RowResult
from trio.measure.fidelity import PromptSample, measure
from trio.measure.shapesvqa.examples import examples
from trio.measure.tuning.space import Space
from trio.measure.tuning.study import Study
from trio.measure.tuning.trials import Found, Judge
from trio.scorers.base import SCORERS
from trio.spec import PipelineSpec, load_spec

SIZES = [(168, 168), (252, 168), (100, 300), (640, 480), (1000, 40), (20, 20)]


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return zoo.load("tiny-qwen2.5-vl")


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


def resizing(resize: int | str, **more: Any) -> PipelineSpec:
    return load_spec({"version": 1, "name": "small", "resize": resize, **more})


def noise(size: tuple[int, int]) -> Image.Image:
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(values.numpy(), "RGB")


def grid(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of visual tokens, as the processor gives them."""
    _, height, width = batch_for(processor, [([noise(size)], "?")])["image_grid_thw"][0].tolist()
    return height // 2, width // 2


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", [8, 50, "75%", "33%", "5%"])
def test_the_count_is_reached_within_a_row_or_a_column(qwen: Any, size: tuple[int, int], resize: int | str) -> None:
    model, processor = qwen
    pipeline = trio.Pipeline(model, resize=resize)
    rows, columns = grid(processor, size)
    goal = min(rows * columns, resize) if isinstance(resize, int) else float(resize[:-1]) / 100 * rows * columns
    found = grid(pipeline.processor(processor), size)
    # Half a step of the finer side, and rounding of the goal itself.
    assert abs(found[0] * found[1] - goal) <= max(found) / 2 + 1
    assert found[0] * found[1] <= rows * columns
    for side, other, reached in ((size[1], size[0], found[0]), (size[0], size[1], found[1])):
        exact = (goal * side / other) ** 0.5  # each side is rounded by less than a token from the image's proportions
        assert abs(reached - exact) < 1 + 0.5 / exact or 1 in found


def test_an_image_that_keeps_its_tokens_is_not_touched(qwen: Any) -> None:
    model, processor = qwen
    image = noise((252, 168))
    plain = batch_for(processor, [([image], "?")])
    for resize in ("100%", 100_000):
        same = batch_for(trio.Pipeline(model, resize=resize).processor(processor), [([image], "?")])
        assert torch.equal(plain["pixel_values"], same["pixel_values"])


def test_the_processor_is_left_as_it_was(qwen: Any) -> None:
    model, processor = qwen
    before = dict(processor.image_processor.size)
    small = trio.Pipeline(model, resize=16).processor(processor)
    assert grid(small, (168, 168)) == (4, 4)
    assert dict(processor.image_processor.size) == before
    assert grid(processor, (168, 168)) == (12, 12)
    assert trio.Pipeline.from_spec("trio-soft-11", model).processor(processor) is processor


def test_every_image_of_a_batch_by_itself(qwen: Any) -> None:
    model, processor = qwen
    pipeline = trio.Pipeline(model, resize="50%")
    inputs = batch_for(pipeline.processor(processor), [([noise((168, 168)), noise((640, 480))], "?"), ([], "?")])
    each = [pipeline.adapter.image_counts(inputs)[0][i] for i in (0, 1)]
    alone = [grid(pipeline.processor(processor), size) for size in ((168, 168), (640, 480))]
    assert each == [rows * columns for rows, columns in alone]


def test_later_shares_are_of_what_is_left(qwen: Any) -> None:
    model, processor = qwen
    spec = resizing("50%", stages=[{"after_layer": 2, "keep": "25%"}], budget={"average": "43.75%"})
    pipeline = trio.Pipeline.from_spec(spec, model)
    inputs = batch_for(pipeline.processor(processor), [([noise((168, 168))], "What is there?")])
    with pipeline, torch.no_grad():
        model(**inputs)
    report = pipeline.report
    rows, columns = grid(pipeline.processor(processor), (168, 168))
    assert report.visual_tokens == rows * columns == 72
    assert report.kept_by_stage == [[18]]
    assert report.resize == "50%"
    assert "resized to 50%" in report.summary()
    assert trio.CompressionReport.from_json(report.to_json()) == report


def test_resize_alone_computes_what_the_stock_model_computes(qwen: Any) -> None:
    model, processor = qwen
    pipeline = trio.Pipeline(model, resize="50%")
    inputs = batch_for(pipeline.processor(processor), [([noise((168, 168))], "What is there?")])
    with torch.no_grad():
        stock = model(**inputs).logits
        with pipeline:
            ours = model(**inputs).logits
    assert torch.equal(stock, ours)
    assert pipeline.report.average_kept == 72


def test_the_cost_is_that_of_the_smaller_image(qwen: Any) -> None:
    model, processor = qwen
    shape = shape_of(model.config)
    alone = predict(resizing("50%"), shape, images=(144,), text_tokens=20, new_tokens=3)
    small = predict(resizing("100%"), shape, images=(72,), text_tokens=20, new_tokens=3)
    whole = predict(resizing("100%"), shape, images=(144,), text_tokens=20, new_tokens=3)
    assert (alone.full, alone.compressed) == (whole.full, small.full)
    stages = {"stages": [{"after_layer": 2, "keep": "25%", "scorer": "random", "selector": "top-k"}]}
    both = predict(resizing("50%", **stages), shape, images=(144,), text_tokens=20)
    assert both.compressed.visual_by_layer == [72, 72, *[18] * (shape.layers - 2)]
    assert (both.visual_tokens, both.retention) == (144, both.average_kept / 144)

    pipeline = trio.Pipeline.from_spec(resizing("50%", **stages), model)
    prompts = [([noise((168, 168))], "What is there?")]
    inputs = batch_for(pipeline.processor(processor), prompts)
    with pipeline, torch.no_grad():
        model(**inputs)
    before = pipeline.adapter.image_counts(batch_for(processor, prompts))
    text = inputs["input_ids"].shape[1] - 72
    found = of_report(pipeline.report, pipeline.spec, shape, before=before)
    asked = predict(pipeline.spec, shape, images=(144,), text_tokens=text)
    assert (found.full, found.compressed) == (asked.full, asked.compressed)
    unknown = of_report(pipeline.report, pipeline.spec, shape)
    assert unknown.full.visual_by_layer[0] == 72
    assert "resized images" in unknown.notes[0]
    with pytest.raises(trio.InputError, match="before"):
        of_report(pipeline.report, pipeline.spec, shape, before=[[144, 144]])


def test_refused_where_size_says_nothing(llava: Any, qwen: Any) -> None:
    model, processor = llava
    with pytest.raises(trio.UnsupportedModelError, match=r"same number of tokens.*average-pool"):
        trio.Pipeline(model, resize="50%")
    with pytest.raises(trio.UnsupportedModelError, match="average-pool"):
        predict(resizing("50%"), published_shape("llava-1.5-7b"))
    pipeline = trio.Pipeline(qwen[0], resize="50%")
    with pytest.raises(trio.InputError, match="resize the images yourself"):
        pipeline.processor(processor)
    with pytest.raises(trio.InputError, match="PIL images"):
        batch_for(pipeline.processor(qwen[1]), [([torch.zeros(3, 168, 168)], "?")])  # type: ignore[list-item]


def test_refused_for_families_that_nobody_described() -> None:
    model, _ = zoo.load("tiny-llava-next")
    with pytest.raises(trio.UnsupportedModelError, match="does not describe"):
        trio.Pipeline(model, resize="50%")


def test_engines_refuse_it_by_name() -> None:
    spec = resizing("50%", compressor={"name": "divprune", "keep": "50%"})
    assert not spec.engine_ready
    assert "resize" in spec.engine_ready.reason


@pytest.mark.parametrize("wrong", [0, -1, 0.5, "0%", "101%", "half", True])
def test_what_is_no_size(wrong: Any) -> None:
    with pytest.raises(trio.SpecError, match="resize"):
        resizing(wrong)


def test_a_spec_with_resize_alone_is_one() -> None:
    spec = resizing("60.0%")
    assert spec.to_dict() == {"version": 1, "name": "small", "resize": "60%"}
    assert (spec.resized(144), spec.resized(1), spec.resized(0)) == (86, 1, 0)
    assert (resizing(100).resized(144), resizing(100).resized(30)) == (100, 30)


def test_an_image_that_no_processor_takes(qwen: Any) -> None:
    patches = patch_processor(qwen[1])
    assert patches is not None
    with pytest.raises(trio.InputError, match="4000x10"):
        resized_size((4000, 10), patches, lambda tokens: tokens // 2)


def test_a_job_resizes(qwen: Any, tmp_path: Any) -> None:
    model, processor = qwen
    noise((168, 168)).save(tmp_path / "a.png")
    pipeline = trio.Pipeline(model, resize="50%")
    with pipeline:
        (row,) = RowAnswerer(model, processor, pipeline, max_new_tokens=2).answer(
            [BatchRow("a", tmp_path / "a.png", "What is there?")]
        )
    assert (row.visual_tokens, row.kept) == (72, 72)


def test_run_compares_with_the_whole_image(tmp_path: Any) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(resizing("50%", stages=[{"after_layer": 2, "keep": "25%"}]).to_yaml())
    said = CliRunner().invoke(app, ["run", "--model", "tiny-qwen2.5-vl", "--spec", str(file), "--json"])
    assert said.exit_code == 0, said.output
    facts = json.loads(said.output)
    assert facts["resize"] == {"asked": "50%", "visual_tokens": 72}
    assert facts["visual_tokens"] == 144
    assert facts["visual_by_layer"][:3] == [72, 72, 18]
    assert facts["flops"]["full"] > facts["flops"]["compressed"]
    tokens = facts["kv_bytes"]["compressed"] / sum(18 if layer > 1 else 72 for layer in range(8))
    assert facts["kv_bytes"]["full"] > tokens * 8 * 72


def test_show_counts_what_is_left(tmp_path: Any) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(resizing("25%", stages=[{"after_layer": 1, "keep": "50%"}]).to_yaml())
    said = CliRunner().invoke(app, ["show", str(file), "--model", "qwen2.5-vl-7b", "--tokens", "1000", "--json"])
    facts = json.loads(said.output)
    assert facts["stages"] == [{"after_layer": 1, "kept": 125}]
    assert facts["visual_by_layer"][:2] == [250, 125]
    assert facts["cost"]["full"]["visual_by_layer"][0] == 1000
    flops = facts["cost"]["full"]["flops"], facts["cost"]["compressed"]["flops"]
    assert flops[1]["tower"] < flops[0]["tower"] / 3


# Measuring: the same images for a spec and its floor, the whole ones for the full model -------------------------------


def test_fidelity_of_a_smaller_image(qwen: Any) -> None:
    samples = [PromptSample(one.image, one.question, str(one.scene)) for one in examples("validation", 5, 1)][:2]
    specs = [resizing("50%"), resizing("50%", name="both", stages=[{"after_layer": 2, "keep": "25%"}])]
    report = measure(*qwen, specs, samples, max_new_tokens=3, batch_size=2)
    alone, both = report.results
    assert alone.equal_cost is None
    equal = both.equal_cost
    assert equal is not None and equal.flops is not None and both.spec.flops is not None
    assert 0 <= both.spec.flops - equal.flops < 0.08  # a step of the grid
    assert 144 > equal.average_kept > both.spec.average_kept
    assert both.equal_gain is not None
    change = both.spec.agreement.kl.mean - equal.agreement.kl.mean
    assert both.equal_gain.kl.mean == pytest.approx(change)
    assert "above equal cost" in report.summary()
    assert (alone.spec.visual_tokens, alone.spec.average_kept) == (144, 72)
    assert alone.floor.average_kept == 72
    assert both.spec.average_kept == both.floor.average_kept < 72
    assert both.spec.flops is not None and alone.spec.flops is not None and alone.floor.flops is not None
    assert both.spec.flops < alone.spec.flops < alone.floor.flops < 1
    whole = predict(resizing("100%"), shape_of(qwen[0].config), images=(144,), text_tokens=20).full.flops
    assert 0.4 < alone.spec.flops < 0.6 and whole.tower / whole.total > 0.2  # the tower is smaller, too


def test_evaluation_of_a_smaller_image(qwen: Any) -> None:
    task = evaluation.shapesvqa(limit=1)
    both = resizing("50%", name="both", stages=[{"after_layer": 2, "keep": "25%"}])
    results = evaluation.evaluate(*qwen, task, [resizing("50%"), both], batch_size=16, speed_rounds=0)
    alone, staged = results.row("small"), results.row("both")
    assert (alone.tokens, alone.average, staged.tokens) == (72, 72, 72)
    assert alone.schedule == "after 0: 50.0%"
    assert staged.schedule.startswith("resized to 50%, after 2: ")
    random = results.control("random", staged.schedule)
    assert random is not None and (random.tokens, random.average) == (72, staged.average)
    spread = results.control("random", alone.schedule)
    assert spread is not None and (spread.tokens, spread.average) == (144, 72)
    assert spread.flops > alone.flops > staged.flops > random.flops


def test_bench_times_the_smaller_image(qwen: Any) -> None:
    model, processor = qwen
    prompts = ImagePrompts(processor, noise((168, 168)), "What is there?")
    settings = BenchSettings(steps=1, rounds=1, seconds=60.0, details=False, search=False)
    both = resizing("50%", name="both", stages=[{"after_layer": 2, "keep": "25%", "selector": "top-k"}])
    report = bench(model, prompts, [resizing("50%"), both], settings=settings)
    alone, staged = report.row("spec", "small"), report.row("spec", "both")
    full, oracle = report.row("full"), report.row("oracle", "both")
    assert alone and staged and full and oracle
    assert oracle.visual_tokens == 72
    assert full.visual_tokens - 72 == alone.visual_tokens == staged.visual_tokens
    assert full.flops > alone.flops > staged.flops > oracle.flops
    built = NoisePrompts(architecture("qwen2.5-vl-7b"), config_of(architecture("qwen2.5-vl-7b")))
    inputs, visual = built.resized(1, both.resized)
    assert visual == built.visual((700, 700)) == 625  # of 1296, the nearest of the built sizes
    assert inputs["image_grid_thw"].tolist() == [[1, 50, 50]]


def test_a_spec_is_held_against_an_image_of_equal_cost(qwen: Any) -> None:
    """The largest image that costs no more; counted again here from the answers, size by size."""
    model = qwen[0]
    task = evaluation.shapesvqa(limit=2)
    options: dict[str, Any] = {"batch_size": 16, "speed_rounds": 0, "sizes": (1.0, 0.5)}
    results = evaluation.evaluate(*qwen, task, ["trio-soft-11", resizing("50%")], **options)
    spec = results.row("trio-soft-11")
    equal = results.row(spec.equal_cost)
    assert equal.control == "equal cost" and equal.schedule == spec.schedule
    assert equal.name.startswith("resize to ")
    assert spec.answer_flops is not None and equal.answer_flops is not None and spec.flops is not None
    assert spec.answer_flops > spec.flops  # decoding is counted
    # No larger image costs as little: what the full model costs at each number of tokens that a square grid can have.
    shape = shape_of(model.config)
    keep = resizing("100%")
    per_token = [
        predict(keep, shape, images=(n,), text_tokens=14, new_tokens=2).full.flops.total for n in (100, 90, 81)
    ]
    step = max(a - b for a, b in pairwise(per_token))
    assert 0 <= spec.answer_flops - equal.answer_flops < 1.2 * step
    assert {90, 81, 100} >= {round(equal.tokens or 0)}
    pairs = [(one.row, one.baseline) for one in results.comparisons]
    assert (equal.name, "trio-soft-11") in pairs
    assert results.row("small").equal_cost == ""
    tokens = results.control("equal tokens", spec.schedule)
    assert tokens is not None and (tokens.answer_flops or 0) < spec.answer_flops / 2  # the old control is much cheaper
    curve = [row for row in results.rows if row.control == "size"]
    assert [(row.name, row.tokens) for row in curve] == [("resize to 100.0%", 144), ("resize to 50.0%", 72)]
    assert results.right["resize to 100.0%"] == results.right["full"]
    assert results.right["resize to 50.0%"] == results.right["small"]
    again = evaluation.EvaluationResults.model_validate_json(results.to_json())
    assert again == results
    _, header, rows = wording.main_table(results)
    assert header[3] == "GFLOPs, answer" and all(len(row) == len(header) for row in rows)
    assert cost_curve(results).startswith("<svg")
    (base, *others) = figures._lines(results, figures.BASELINE).items()
    assert {row.name for row in base[1]} == {"full", "resize to 100.0%", "resize to 50.0%", equal.name}
    assert not {row.name for _, rows in others for row in rows} & {row.name for row in base[1]}


def test_where_images_have_one_size_tokens_are_pooled(llava: Any) -> None:
    task = evaluation.shapesvqa(limit=1)
    pool = load_spec({"version": 1, "name": "pool", "compressor": {"name": "average-pool", "keep": 20}})
    results = evaluation.evaluate(*llava, task, ["trio-soft-11", pool], batch_size=16, speed_rounds=0, sizes=[0.25])
    spec = results.row("trio-soft-11")
    equal = results.row(spec.equal_cost)
    assert equal.name.startswith("average-pool to ")
    assert spec.answer_flops is not None and equal.answer_flops is not None
    assert spec.average is not None and equal.average is not None
    one = (results.row("full").answer_flops - equal.answer_flops) / (144 - equal.average)  # type: ignore[operator]
    assert -0.1 * one <= spec.answer_flops - equal.answer_flops < 1.5 * one
    assert equal.average > spec.average  # scoring has its price
    assert results.row("pool").equal_cost == ""
    assert results.row("average-pool to 25.0%").average == 36


def test_results_of_earlier_versions_are_read() -> None:
    row = RowResult.model_validate({"name": "lower resolution, after 0: 11.1%", "control": "lower resolution"})
    assert row.control == "equal tokens"


@pytest.mark.parametrize("wrong", ["half", "0%", "120%", "50%,"])
def test_sizes_that_are_none(wrong: str, tmp_path: Any) -> None:
    said = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "out"), "--sizes", wrong])
    assert said.exit_code == 2 and "--sizes" in said.stderr
    with pytest.raises(trio.InputError, match="sizes"):
        evaluation.evaluate(None, None, evaluation.shapesvqa(limit=1), ["trio-soft-11"], sizes=[1.5])


def test_a_search_tries_smaller_images(qwen: Any, llava: Any) -> None:
    adapter = adapter_for(qwen[0])
    space = Space.of(adapter, without=["divprune", "visionzip", "vispruner", "scan", "prumerge", "tome"])
    assert space.resizes[0] == "100%" and len(space.resizes) > 3
    study = Study(None, {}, seed=3, sampler="tpe")
    seen: list[PipelineSpec] = []

    def judge(spec: PipelineSpec) -> Found:
        seen.append(spec)
        return Found({"agreement": 0.5, "flops": 0.5 + len(seen) / 100}, {}, 0.1)

    study.run(30, space, space.starts(144), judge, "agreement", None)
    assert [spec.resize for spec in seen[:3]] == [None] * 3  # it begins with the default
    assert {spec.resize for spec in seen} == {None, *space.resizes[1:]}
    assert any(spec.resize and not spec.stages and spec.compressor is None for spec in seen)
    assert Space.of(adapter_for(llava[0])).resizes == ()

    seen.clear()
    compressors = Space.of(adapter, without=SCORERS.names())
    Study(None, {}, seed=3, sampler="tpe").run(30, compressors, [], judge, "agreement", None)
    assert any(spec.resize and spec.compressor is None for spec in seen)
    assert any(not spec.resize for spec in seen) and all(spec.resize or spec.compressor for spec in seen)

    samples = [PromptSample(one.image, one.question, str(one.scene)) for one in examples("validation", 5, 1)][:3]
    found = Judge(GreedyAnswerer(*qwen, max_new_tokens=2), samples, batch_size=2, timed=True)
    half, whole = found.judge(resizing("50%")), found.judge(resizing("100%"))
    assert half.values["tokens"] == 0.5 and whole.values["tokens"] == 1
    assert whole.values["agreement"] == whole.values["answers"] == 1 and whole.kl == 0
    assert 0.4 < half.values["flops"] < 0.6 and whole.values["flops"] == 1
    assert half.values["speed"] > 0
