"""The naive comparison, and the performance page, which is what the committed results say."""

from __future__ import annotations

import json

import pytest
import torch

import trio
from benchmarks import gpu, performance, speed
from benchmarks.growth import compressor_case, scorer_case, selector_case, series
from benchmarks.naive import LoopNMS, WholeLayer, naive
from trio.adapters import adapter_for
from trio.core.context import SelectionContext
from trio.measure.bench import BenchSettings, NoisePrompts, architecture, build, config_of, measure
from trio.measure.bench.ways import Maker
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS
from trio.spec import load_spec

SPEC = load_spec("trio-soft-11")


@pytest.fixture(scope="module")
def built():
    shape = gpu.smoke(architecture("llava-1.5-7b"))
    config = config_of(shape)
    return build(config, dtype=torch.float32), NoisePrompts(shape, config)


def test_the_naive_way_rates_as_the_probe_does(built):
    model, prompts = built
    maker = Maker(adapter_for(model), prompts, samples=1, steps=0, shape=None)
    rated = {}
    for name, scorer in {
        "naive": WholeLayer(adapter=maker.adapter),
        "probe": SCORERS.build({"name": "objective-gradient", "rows": "prompt-end", "positions": 4}),
    }.items():
        pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=4, keep=64, scorer=scorer, selector="top-k")])
        rated[name] = pipeline.score(maker.inputs)[0][0]
    assert torch.allclose(rated["naive"] / rated["naive"].max(), rated["probe"] / rated["probe"].max(), atol=1e-4)


def test_the_naive_suppression_keeps_the_same_tokens():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 60, 3, generator=generator)
    context = SelectionContext.start(torch.rand(2, 60, generator=generator), features, torch.tensor([20, 30]))
    found, there = LoopNMS().select(context)
    wanted, also = SELECTORS.build("nms").select(context)
    assert torch.equal(there, also) and torch.equal(found[there], wanted[also])


def test_the_naive_way_is_a_row_of_the_benchmark(built):
    model, prompts = built
    settings = BenchSettings(steps=0, rounds=1, controls=False, details=False, search=False)
    report = measure(model, prompts, [SPEC], settings=settings, more=lambda maker: naive(maker, [SPEC]))
    row = report.row("naive", SPEC.name)
    assert row is not None and row.over_oracle is not None
    assert row.average_kept == report.row("spec", SPEC.name).average_kept


def test_an_accelerator_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(trio.TrioError, match="--device cpu --smoke"):
        gpu.main(device="cuda", small=False)
    with pytest.raises(trio.TrioError, match="--smoke"):
        gpu.main(device="cpu", small=False)


def test_the_whole_plan_runs_on_a_small_model(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PLAN", (("llava-1.5-7b", ("trio-soft-11",), 2),))
    gpu.main(device="cpu", small=True, out=tmp_path)
    assert json.loads((tmp_path / "profile-llava-1.5-7b-2-cpu.json").read_text())
    text = performance.page(tmp_path)
    assert "naive trio-soft-11" in text and "Not measured yet" in text


def test_the_page_is_what_the_results_say():
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page()


def test_commands_of_results_name_what_there_is():
    for file in speed.RESULTS.glob("bench-*.json"):
        assert json.loads(file.read_text())["command"].startswith(("python -m benchmarks.", "trio bench")), file.name


@pytest.mark.parametrize(
    "case",
    [scorer_case("objective-gradient"), selector_case("nms"), compressor_case("visionzip")],
    ids=("scorer", "selector", "compressor"),
)
def test_a_series_has_exponents_and_ends_before_it_does_not_fit(case, monkeypatch):
    points = [(400, 8, 1), (800, 8, 1), (1600, 8, 1)]
    found = series(case, points)
    assert [row["point"] for row in found["rows"]] == points
    assert 0.3 < found["largest exponent"] < 1.2
    monkeypatch.setattr("benchmarks.growth.PATIENCE", 0.0)
    assert len(series(case, [(100, 8, 1), (200, 8, 1)])["rows"]) == 1
