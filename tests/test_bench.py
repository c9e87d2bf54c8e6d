"""`trio bench`: the arithmetic of its statistics, the ways that it compares, and the command, on tiny models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from statistics import median

import pytest
import torch
from typer.testing import CliRunner

from trio import zoo
from trio.adapters import adapter_for
from trio.cli import app
from trio.cost import published_shape, shape_of
from trio.errors import InputError, UnknownNameError
from trio.measure.bench import (
    ARCHITECTURES,
    BenchReport,
    BenchRow,
    BenchSettings,
    ImagePrompts,
    Machine,
    NoisePrompts,
    architecture,
    build,
    config_of,
    measure,
)
from trio.measure.bench import architectures as shapes
from trio.measure.bench.numbers import interval, spread
from trio.measure.bench.plot import plot, roofline
from trio.measure.bench.targets import judge
from trio.measure.bench.timing import Round, TimedWay, phases, rounds, run
from trio.measure.bench.ways import Maker
from trio.scorers.base import SCORERS
from trio.spec import load_spec

HERE = Machine(
    device="cpu: a test", threads=1, load=None, flops_per_second=1e10, bytes_per_second=1e10, versions={"torch": "0"}
)
QUICK = BenchSettings(steps=1, rounds=1, seconds=60.0, details=False, search=False)
SPEC = load_spec("trio-soft-11")
BOTH = {
    "version": 1,
    "name": "both",
    "compressor": {"name": "divprune", "keep": 48},
    "stages": [{"after_layer": "50%", "keep": 16}],
}


def small(name: str):
    """An architecture of the same kinds of modules, narrow and shallow."""
    whole = architecture(name)
    text, vision = dict(whole.config["text_config"]), dict(whole.config["vision_config"])
    text |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"num_hidden_layers": 6, "vocab_size": 2000, "head_dim": 16}
    vision |= {"hidden_size": 32, "intermediate_size": 48}
    if "depth" in vision:
        vision |= {"depth": 6, "num_heads": 4, "out_hidden_size": 64}
        sections = [2, 3, 3]
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": sections}
        vision |= {key: [1, 3, 5] for key in whole.by_depth}
    else:
        vision |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {key: 1900 + place for place, key in enumerate(whole.config) if key.endswith("_token_id")}
    return replace(whole, config={**whole.config, **ids, "text_config": text, "vision_config": vision})


@pytest.fixture(scope="module")
def tiny():
    model, processor = zoo.load("tiny-llava")
    from trio.core.images import load_image

    return model, ImagePrompts(processor, load_image(zoo.demo_image()), zoo.demo_question())


# Numbers


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 15, 20])
def test_the_interval_of_a_median_covers_what_it_says(count):
    found = interval([float(value) for value in range(1, count + 1)])
    assert found.value == median(range(1, count + 1))
    low, high = int(found.low), int(found.high)
    # by counting: the median of the distribution lies above so many of the values as heads are thrown
    inside = sum(low <= heads <= high - 1 for heads in map(sum, product((0, 1), repeat=min(count, 15))))
    if count <= 15:
        assert math.isclose(found.coverage, inside / 2**count)
    if count >= 6:
        assert found.coverage >= 0.95
    assert low + high == count + 1


def test_spread_has_the_middle_half():
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0])
    assert (found.median, found.low, found.high, found.rounds) == (4.5, 3.0, 7.0, 8)


# Architectures


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"])
def test_configurations_have_the_published_shapes(name):
    found, known = shape_of(config_of(architecture(name))), published_shape(name)
    assert found.model_dump(exclude={"name", "source"}) == known.model_dump(exclude={"name", "source"})


def test_fewer_layers_cut_the_tower_in_proportion():
    config = config_of(architecture("qwen2.5-vl-7b"), layers=7)
    assert (config.text_config.num_hidden_layers, config.vision_config.depth) == (7, 8)
    assert config.vision_config.fullatt_block_indexes == [1, 3, 5, 7]
    with pytest.raises(InputError, match="28"):
        architecture("qwen2.5-vl-7b").arguments(29)
    with pytest.raises(UnknownNameError, match=r"qwen2\.5-vl-7b"):
        architecture("qwen2.5-vl")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_built_model_runs_and_shares_its_layers(name):
    shape = small(name)
    config = config_of(shape)
    model = build(config, dtype=torch.float32)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    prompts = NoisePrompts(shape, config, text_tokens=16, largest=shape.sizes[-1])
    batch = prompts.batch(2)
    adapter = adapter_for(model)
    taken = run(model, batch, 2)
    assert len(taken.steps) == 2 and taken.prefill > 0
    first, last = (dict(adapter.layers[place].named_parameters()) for place in (0, -1))
    assert all(first[name] is last[name] for name in first)
    visual = int((batch["input_ids"] == config.image_token_id).sum()) // 2
    assert visual == prompts.visual(prompts.sizes[0])


# Ways


def test_rounds_take_turns_and_leave_the_first_out(tiny, monkeypatch):
    order = []
    monkeypatch.setattr("trio.measure.bench.timing.run", lambda model, inputs, steps: order.append(inputs) or Round(1))
    ways = [TimedWay(name, name, torch.no_grad, 0) for name in "abc"]
    found = rounds(tiny[0], ways, least=2, most=3, seconds=1e9)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3, "c": 3}
    order.clear()
    rounds(tiny[0], ways, least=2, most=9, seconds=0.0)
    assert len(order) == 9  # the first and the two that are run whatever they take


@pytest.mark.parametrize(
    "spec",
    ["trio-soft-11", "visionzip-llava-1.5-64", BOTH],
    ids=lambda spec: spec if isinstance(spec, str) else spec["name"],
)
def test_the_oracle_keeps_as_many_and_rates_nothing(tiny, monkeypatch, spec):
    model, prompts = tiny
    loaded = load_spec(spec)
    maker = Maker(adapter_for(model), prompts, samples=1, steps=0, shape=shape_of(model.config))
    made = {entry.kind: entry for entry in maker.of_spec(loaded)}
    for part in {stage.scorer.name for stage in loaded.stages} | {"random"}:
        monkeypatch.setattr(SCORERS.get(part), "score", lambda self, ctx: pytest.fail("the oracle rated tokens"))
    with made["oracle"].way.attached() as attached:
        run(model, made["oracle"].way.inputs, 0)
    assert attached.report.average_kept == pytest.approx(made["spec"].kept)
    assert made["oracle"].flops == made["spec"].flops - made["spec"].overhead
    assert made["pool"].flops == pytest.approx(made["spec"].flops, rel=0.05)


def test_resizing_is_at_equal_cost_where_images_have_sizes():
    shape = small("qwen2.5-vl-7b")
    config = config_of(shape)
    model = build(config, dtype=torch.float32)
    prompts = NoisePrompts(shape, config, text_tokens=16, largest=(336, 336))
    maker = Maker(adapter_for(model), prompts, samples=1, steps=0, shape=shape_of(config))
    made = {entry.kind: entry for entry in maker.of_spec(SPEC)}
    assert "pool" not in made
    assert made["resize"].visual < maker.visual
    assert made["resize"].flops == pytest.approx(made["spec"].flops, rel=0.10)


def test_phases_add_up_and_nested_modules_count_once(tiny):
    model, prompts = tiny
    maker = Maker(adapter_for(model), prompts, samples=1, steps=0, shape=None)
    entry = maker.of_spec(SPEC)[0]
    way = replace(entry.way, attached=lambda: entry.pipeline)
    found = phases(maker.adapter, entry.pipeline, way, repeats=1)
    assert set(found) == {"tower", "layers", "scoring", "selection", "other"}
    assert all(seconds > 0 for seconds in found.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in maker.adapter.layers)


# The whole


def test_measure_fills_every_row(tiny):
    model, prompts = tiny
    report = measure(model, prompts, [SPEC], settings=replace(QUICK, details=True), machine=HERE)
    assert [row.kind for row in report.rows] == ["full", "keep-all", "spec", "oracle", "pool", "short"]
    assert BenchReport.from_json(report.to_json()) == report
    row = report.row("spec", "trio-soft-11")
    assert row.speedup.rounds == row.over_oracle.rounds == row.decode_over_short.rounds == 1
    assert 100 < report.row("full", None).launches < row.launches < 3 * report.row("full", None).launches
    assert {target.name for target in report.targets} == {
        "all kept, over the untouched model",
        "prefill, over the oracle's",
        "speed-up / reduction of FLOPs",
        "decode step, over as short a cache",
    }
    assert roofline(report, shape_of(model.config))[0][0] == report.visual_tokens


def test_where_a_spec_loses_the_smallest_batch_that_wins_is_named(tiny, monkeypatch):
    model, prompts = tiny
    wins = {2: 0.8, 4: 1.3}
    monkeypatch.setattr("trio.measure.bench.verdicts.speedup", lambda spec, maker: wins.get(maker.samples, 0.5))
    row = BenchRow(name="x", kind="spec", spec=SPEC.name, visual_tokens=144, average_kept=16, speedup=interval([0.9]))
    from trio.measure.bench.verdicts import verdict

    maker = Maker(adapter_for(model), prompts, samples=1, steps=0, shape=None)
    found = verdict(SPEC, [row], maker, search=True)
    assert not found.faster
    assert found.smallest == {"batch": "4", "budget": None, "image": None}
    assert "from batch 4 on" in str(found)
    faster = row.model_copy(update={"speedup": interval([1.1])})
    assert verdict(SPEC, [faster], maker, search=True).faster


def test_targets_are_judged_by_share_and_by_batch():
    def row(kind, seconds, flops, overhead=0):
        return BenchRow(
            name=kind,
            kind=kind,
            spec=None if kind == "full" else "s",
            visual_tokens=10,
            average_kept=1,
            flops=flops,
            overhead_flops=overhead,
            speedup=interval([10 / seconds]),
            over_oracle=interval([seconds / 2]),
            phases={"layers": seconds},
        )

    rows = [row("full", 10, 400), row("oracle", 2, 95), row("spec", 2.2, 100, 5)]
    alone = {target.name: target for target in judge(rows, batch=1, accelerator=False)}
    over = alone["prefill, over the oracle's"]
    assert over.bound == pytest.approx(5 / 95 + 0.03) and over.found == pytest.approx(0.1) and not over.held
    assert over.note == "layers 100%"
    ratio = alone["speed-up / reduction of FLOPs"]
    assert ratio.found == pytest.approx(10 / 2.2 / 4) and ratio.held
    (batch,) = (t for t in judge(rows, batch=8, accelerator=True) if "oracle" in t.name)
    assert batch.bound == 0.05 and not batch.held


def test_the_command_writes_prints_and_draws(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.ARCHITECTURES, "llava-1.5-7b", small("llava-1.5-7b"))
    out, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--rounds", "1", "--steps", "1", "--quick", "--out", str(out), "--plot", str(drawn)]
    done = CliRunner().invoke(app, ["bench", "--arch", "llava-1.5-7b", "--layers", "4", *options])
    assert done.exit_code == 0, done.output
    assert "trio-soft-11" in done.output and "oracle" in done.output
    assert [row["kind"] for row in json.loads(out.read_text())["rows"]] == ["full", "spec", "oracle"]
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of them"),
        (["tiny-llava", "--arch", "llava-1.5-7b"], "give one of them"),
        (["tiny-llava", "--layers", "2"], "they go with --arch"),
        (["--arch", "llava-1.5-7b", "--question", "What?"], "they go with MODEL"),
        (["--arch", "llava-1.5-7b", "--layers", "33"], "give 1 to 32"),
        (["--arch", "qwen2.5-vl-7b", "--size", "wide"], "such as 672x672"),
        (["--arch", "gpt"], "no such architecture"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_made(arguments, message, monkeypatch):
    monkeypatch.setattr("trio.measure.bench.build", lambda *a, **k: pytest.fail("a model was built"))
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_without_matplotlib_the_plot_is_refused_by_the_name_of_its_extra(tiny, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = BenchReport(
        model="m", layers=1, weights="", dtype="float32", machine=HERE, batch=1, image=(1, 1), visual_tokens=1,
        text_tokens=1, steps=0, rows=[],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"\[plot\]"):
        plot(report, None, tmp_path / "x.png")
