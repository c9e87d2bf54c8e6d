"""The schedule: layers, counts, averages, and the solver against published numbers and properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trio.errors import BudgetError, InputError, SpecError
from trio.spec import PipelineSpec, load_spec
from trio.spec.schedule import ResolvedSchedule, resolve


def spec(*stages: tuple[Any, Any], **more: Any) -> PipelineSpec:
    data = [{"after_layer": a, "keep": k, **(rest[0] if rest else {})} for a, k, *rest in stages]
    return PipelineSpec.parse({"version": 1, "stages": data, **more})


# Published schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "compressor", "layers", "started", "average"),
    [
        ([(1, 218), (10, 128), (15, 54)], None, 32, 576, 128.0),
        ([(1, 92), (10, 54), (15, 22)], None, 32, 576, 64.0),
        ([(16, 32)], 96, 32, 576, 64.0),
        ([(1, 436), (10, 255), (15, 173)], None, 32, 2880, 344.375),
        ([(1, 460), (10, 270), (15, 110)], None, 32, 2880, 320.0),
        ([(14, {"share": "33.3%", "of": "current"})], "16.7%", 28, 576, (96 + 32) / 2),
        ([(8, "50%"), (16, "25%"), (24, "12.5%")], None, 32, 576, 576 * (1 + 0.5 + 0.25 + 0.125) / 4),  # PyramidDrop
    ],
)
def test_published_schedules(stages: Any, compressor: Any, layers: int, started: int, average: float) -> None:
    first = None if compressor is None else {"name": "scan", "keep": compressor}
    schedule = resolve(spec(*stages, compressor=first), layers)
    assert schedule.average(started) == pytest.approx(average, abs=1e-9)
    counts = schedule.counts(started)
    assert len(counts) == layers
    assert counts[0] == (started if compressor is None else schedule.compressed_count(started))


def test_counts_by_layer() -> None:
    schedule = resolve(load_spec("trio-llava-1.5-64"), 32)
    assert schedule.layers == (1, 10, 15)
    assert schedule.counts(576) == (576,) + (92,) * 9 + (54,) * 5 + (22,) * 17
    assert schedule.stage_counts(60) == (60, 54, 22)  # a thumbnail: keep-all


def test_shipped_specs_meet_their_names() -> None:
    for name, average in [("trio-llava-1.5-64", 64), ("trio-llava-1.5-128", 128), ("trio-llava-1.5-192", 192)]:
        assert abs(resolve(load_spec(name), 32).average(576) - average) <= 0.5


def test_trio_11_is_the_published_shape_on_llava() -> None:
    schedule = resolve(load_spec("trio-11"), 32)
    assert schedule.layers == (1, 10, 15)
    assert schedule.stage_counts(576) == (92, 54, 22)


@given(layers=st.integers(5, 100), started=st.integers(1, 4000))
def test_trio_11_holds_on_any_model(layers: int, started: int) -> None:
    schedule = resolve(load_spec("trio-11", check_parts=False), layers)
    schedule.check(started)
    error = abs(schedule.average(started) - 0.111 * started)
    assert error <= 0.5 or min(schedule.stage_counts(started)) == 1


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "layers", "layer"), [("50%", 8, 4), ("50%", 7, 3), ("29%", 100, 29), ("0%", 4, 0), (3, 4, 3)]
)
def test_shares_of_the_depth_round_down(after: Any, layers: int, layer: int) -> None:
    assert resolve(spec((after, 3)), layers).layers == (layer,)


@pytest.mark.parametrize(
    ("stages", "layers", "says"),
    [
        ([(4, 3)], 4, r"stages\[0\].after_layer: found 4, but the model has 4 decoder layers.*allowed are 0 to 3"),
        ([(1, 3), (40, 2)], 32, r"stages\[1\].after_layer: found 40, but the model has 32"),
        ([("50%", 3), ("55%", 2)], 8, r"stages\[1\].after_layer: '55%' is layer 4 of 8.*two stages cannot act at one"),
        ([("50%", 3), (4, 2)], 8, r"4 is layer 4 of 8, and stages\[0\] \('50%'\) is layer 4; two stages"),
        (
            [("50%", 3), (3, 2)],
            8,
            r"3 is layer 3 of 8, and stages\[0\] \('50%'\) is layer 4; the stages are out of order",
        ),
    ],
)
def test_layers_that_cannot_be(stages: Any, layers: int, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        resolve(spec(*stages), layers)
    assert caught.value.spec_path.endswith("after_layer")


def test_a_model_has_layers() -> None:
    with pytest.raises(InputError, match="at least one decoder layer"):
        resolve(spec((0, 3)), 0)


# Counts of one group -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "started", "current", "kept"),
    [
        (32, 576, 576, 32),
        (32, 576, 20, 20),
        (0, 576, 20, 0),
        ("11.1%", 576, 576, 64),
        ("11.1%", 576, 30, 30),
        ("0.1%", 100, 50, 1),  # a share keeps at least one token
        ("0.1%", 0, 0, 0),
        ("50%", 5, 5, 3),  # half up
        ({"share": "33.3%", "of": "current"}, 576, 96, 32),
        ({"count": 64, "per": "sample"}, 1152, 1152, 64),
    ],
)
def test_keep_count(keep: Any, started: int, current: int, kept: int) -> None:
    schedule = resolve(spec((2, keep)), 8)
    assert schedule.keep_count(0, started, current) == kept
    assert schedule.group(0) == ("sample" if isinstance(keep, dict) and keep.get("per") == "sample" else "image")


def test_if_fewer_error() -> None:
    schedule = resolve(spec((2, 32, {"if_fewer": "error"})), 8)
    assert schedule.keep_count(0, 40, 32) == 32
    with pytest.raises(BudgetError, match=r"stages\[0\]: 32 tokens are to be kept, but only 31 of 40 reach it"):
        schedule.keep_count(0, 40, 31)
    strict = resolve(spec(compressor={"name": "scan", "keep": 96, "if_fewer": "error"}), 8)
    with pytest.raises(BudgetError, match="compressor: 96 tokens are to be kept"):
        strict.compressed_count(50)


def test_a_compressor_that_decides_for_itself() -> None:
    schedule = resolve(spec((4, 16), compressor="prumerge"), 8)
    assert schedule.compressed_count(576) is None
    assert schedule.counts(576, compressed=40) == (40,) * 4 + (16,) * 4
    with pytest.raises(InputError, match="give `compressed`"):
        schedule.counts(576)
    assert schedule.compressor_group() == "image"


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="0 or more visual tokens"):
        resolve(spec((4, 16)), 8).counts(-1)


# The solver ----------------------------------------------------------------------------------------------------------


def test_auto_with_one_stage_by_hand() -> None:
    schedule = resolve(spec((16, "auto"), budget={"average": 300}), 32)
    assert schedule.stage_counts(576) == (24,)  # (576 * 16 + 24 * 16) / 32 = 300
    assert schedule.average(576) == 300


def test_every_auto_stage_keeps_the_same_fraction() -> None:
    schedule = resolve(spec((0, "auto"), (8, "auto"), (16, "auto"), budget={"average": "20%"}), 32)
    first, second, third = schedule.stage_counts(10_000)
    assert second / first == pytest.approx(first / 10_000, abs=1e-3)
    assert third / second == pytest.approx(first / 10_000, abs=1e-2)


def test_explicit_stages_are_honoured() -> None:
    schedule = resolve(spec((1, "auto"), (8, 50), (16, "auto"), budget={"average": 64}), 32)
    counts = schedule.stage_counts(576)
    assert counts[1] == 50
    assert abs(schedule.average(576) - 64) <= 0.5


def test_auto_compressor() -> None:
    schedule = resolve(spec((16, 32), compressor={"name": "scan", "keep": "auto"}, budget={"average": 64}), 32)
    assert schedule.compressed_count(576) == 96
    assert schedule.average(576) == 64


def test_small_images_keep_all_within_the_budget() -> None:
    schedule = resolve(spec((4, "auto"), budget={"average": 64}), 8)
    assert schedule.counts(40) == (40,) * 8
    assert schedule.counts(0) == (0,) * 8
    schedule.check(40)
    strict = resolve(spec((4, "auto", {"if_fewer": "error"}), budget={"average": 64}), 8)
    with pytest.raises(BudgetError, match="cannot be met for an image of 40 tokens"):
        strict.counts(40)


@pytest.mark.parametrize(
    ("data", "layers", "says"),
    [
        (((16, "auto"),), 32, "10.00% cannot be met on 32 layers; between 50.00% and 100.00% is reachable"),
        (((1, "2%"), (16, "auto")), 32, "10.00% cannot be met on 32 layers; between 4.06% and 5.06% is"),
        (((1, "2%"), (16, "1%")), 32, "the counts contradict the stated 10.00%: on 32 layers they amount to 4.56%"),
        (((16, "5%"),), 32, "the counts contradict the stated 10.00%: on 32 layers they amount to 52.50%"),
    ],
)
def test_shares_that_contradict(data: Any, layers: int, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        resolve(spec(*data, budget={"average": "10%"}), layers)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (spec((16, 32), compressor={"name": "scan", "keep": 96}, budget={"average": 70}), "amount to 64.00 tokens"),
        (spec((0, 96), (16, 32), budget={"average": 60}), "amount to 64.00 tokens"),
        (spec((16, 50), budget={"average": 50}), None),
        (
            spec((1, 218), (10, 128), (15, 54), budget={"average": 64}),
            "contradict the stated 64 tokens.*at least 116.8",
        ),
        (
            spec((16, "auto"), compressor={"name": "scan", "keep": 96}, budget={"average": 40}),
            "between 48.00 tokens and",
        ),
    ],
)
def test_counts_that_contradict(data: PipelineSpec, says: str | None) -> None:
    if says is None:
        assert resolve(data, 32).target == 50
        return
    with pytest.raises(BudgetError, match=says):
        resolve(data, 32)


def test_unreachable_for_one_image() -> None:
    schedule = resolve(spec((16, "auto"), budget={"average": 64}), 32)
    with pytest.raises(
        BudgetError, match=r"64 tokens cannot be met for an image of 576 tokens.*between 288.00 \(50.0%\) and"
    ):
        schedule.keep_count(0, 576, 576)


def test_check_of_a_promise() -> None:
    schedule = resolve(spec((1, 92), (10, 54), (15, 22), budget={"average": 64}), 32)
    schedule.check(576)
    schedule.check(80)  # a thumbnail keeps all that it has
    with pytest.raises(
        BudgetError, match=r"64 tokens was promised, but an image of 2880 tokens keeps 136.00 on average"
    ):
        schedule.check(2880)
    with pytest.raises(BudgetError, match="keeps 62"):
        schedule.check(512)


KEEP = st.one_of(
    st.just("auto"),
    st.integers(1, 300),
    st.integers(1, 1000).map(lambda x: f"{x / 10}%"),
    st.integers(1, 1000).map(lambda x: {"share": f"{x / 10}%", "of": "current"}),
)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ResolvedSchedule, int]:
    """A resolved spec that may mix everything, and a number of tokens."""
    layers = draw(st.integers(1, 60))
    depths = sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1, max_size=5)))
    keeps = draw(st.lists(KEEP, min_size=len(depths), max_size=len(depths)))
    first = draw(st.none() | KEEP)
    budget = draw(st.integers(1, 400) | st.integers(1, 999).map(lambda x: f"{x / 10}%"))
    auto = "auto" in [*keeps, first]
    try:
        made = spec(
            *zip(depths, keeps, strict=True),
            compressor=None if first is None else {"name": "scan", "keep": first},
            budget={"average": budget} if auto else None,
        )
        return resolve(made, layers), draw(st.integers(0, 3000))
    except (SpecError, BudgetError):
        assume(False)
        raise


@given(schedules())
def test_properties_of_any_schedule(drawn: tuple[ResolvedSchedule, int]) -> None:
    schedule, started = drawn
    try:
        counts = schedule.counts(started)
    except BudgetError:
        assert any(rule.keep is not None and rule.keep.auto for rule in (schedule.compressor, *schedule.stages) if rule)
        return
    assert len(counts) == schedule.num_layers
    assert all(later <= earlier for earlier, later in zip((started, *counts), counts, strict=False))
    assert (min(counts) >= 1) == (started >= 1) or any(rule.keep and rule.keep.count == 0 for rule in schedule.stages)
    kept = schedule.stage_counts(started)
    for stage, layer in enumerate(schedule.layers):
        before = counts[layer - 1] if layer else schedule.compressed_count(started)
        assert before is not None
        assert schedule.keep_count(stage, started, before) == kept[stage] == counts[layer]
    assert schedule.average(started) == pytest.approx(sum(counts) / schedule.num_layers)


@given(
    layers=st.integers(1, 60),
    depths=st.sets(st.integers(0, 59), min_size=1, max_size=4),
    budget=st.integers(1, 600) | st.integers(1, 999).map(lambda x: f"{x / 10}%"),
    started=st.integers(1, 3000),
)
def test_auto_hits_the_average_within_half_a_token(layers: int, depths: set[int], budget: Any, started: int) -> None:
    stages = [(depth, "auto") for depth in sorted(depths) if depth < layers]
    assume(stages)
    target = budget if isinstance(budget, int) else float(budget[:-1]) / 100 * started
    first = stages[0][0] / layers * started
    try:
        schedule = resolve(spec(*stages, budget={"average": budget}), layers)
        average = schedule.average(started)
    except BudgetError:
        assert target < first  # the layers before the first stage alone exceed it
        return
    if target >= started:
        assert average == started
    elif min(schedule.stage_counts(started)) > 1:
        assert abs(average - target) <= 0.5 + 1e-9
    else:  # at least one token stays
        assert average >= target - 0.5 - 1e-9


@given(started=st.integers(1, 2000), smaller=st.integers(1, 398), step=st.integers(1, 200))
def test_a_larger_budget_never_keeps_fewer(started: int, smaller: int, step: int) -> None:
    def average(budget: int) -> float:
        return resolve(spec((0, "auto"), (5, "auto"), budget={"average": budget}), 20).average(started)

    assert average(smaller + step) >= average(smaller) - 0.5


def test_nothing_is_remembered_between_sizes() -> None:
    schedule = resolve(load_spec("trio-11"), 8)
    first = schedule.counts(144)
    schedule.counts(576)
    assert schedule.counts(144) == first
    assert resolve(load_spec("trio-11"), 8) == schedule
    assert hash(resolve(load_spec("trio-11"), 8)) == hash(schedule)
