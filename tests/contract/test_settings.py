"""Every scorer with every selector, several stages, a stage at the input, counts for images and for samples."""

from __future__ import annotations

import pytest
from support.bench import TOKENS, bench
from support.models import llava

import trio
from trio.testing import check_adapter
from trio.testing.bench import END, ONE, RAGGED, TEXT, TWO, Setting
from trio.testing.promises.batch import singles
from trio.testing.promises.decode import decoded

pytestmark = pytest.mark.contract

SCORERS = [
    *trio.SCORERS.names(),
    {"name": "objective-gradient", "rows": "released", "positions": 2},
    {"name": "objective-gradient", "probe_layer": "last"},
    {"name": "random", "seed": 3},
]
SELECTORS = [*trio.SELECTORS.names(), {"name": "nms", "threshold": 0.2}]
COUNTS = [
    (0, 0),
    (5, 3),
    ("50%", {"share": "50%", "of": "current"}),
    ({"count": 9, "per": "sample"}, {"count": 4, "per": "sample"}),
    ({"share": "60%", "per": "sample"}, {"share": "25%", "of": "current", "per": "image"}),
    ("40%", {"count": 3, "per": "sample"}),
]


def two(first, second, scorer="objective-gradient", selector="nms", layers=(1, 3)):
    return [
        {"after_layer": layer, "keep": keep, "scorer": scorer, "selector": selector}
        for layer, keep in zip(layers, (first, second), strict=True)
    ]


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_every_scorer_with_every_selector(scorer, selector):
    promises = ["identity", "decode", "batch", "attention"]
    check_adapter(llava(), TOKENS, stages=two("50%", "25%", scorer, selector), promises=promises)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(("first", "second"), COUNTS, ids=str)
def test_counts(first, second, positions):
    setting = Setting("counts", two(first, second, layers=(0, 2)), positions)
    work = bench(llava(seed=1), setting)
    for side in ("left", "right"):
        singles(work, setting, side)
    decoded(work, setting, RAGGED)


@pytest.mark.parametrize("layers", [(0,), (5,), (0, 5), (0, 1, 2, 3, 4, 5), (2, 3, 4)], ids=str)
def test_stages_anywhere(layers):
    keeps = [14, 11, 9, 7, 4, 2]
    stages = [{"after_layer": layer, "keep": keep} for layer, keep in zip(layers, keeps, strict=False)]
    check_adapter(llava("qwen3", "siglip"), TOKENS, stages=stages, promises=["decode", "batch", "generation"])


def test_counts_are_kept():
    """What `per: image` and `per: sample` mean, with the numbers that the report gives."""
    work = bench(llava())
    inputs = work.inputs(ONE, TWO, TEXT, END)
    for keep, expected in ((5, [5, 10, None, 5]), ({"count": 5, "per": "sample"}, [5, 5, None, 5])):
        setting = Setting("one stage", [{"after_layer": 2, "keep": keep}])
        pipeline = work.pipeline(setting)
        with pipeline:
            work.forward(inputs)
        assert pipeline.report.kept_by_stage == [[] if count is None else [count] for count in expected]
        groups = pipeline.report.samples[1].stages[0].groups
        assert [group.image for group in groups] == ([0, 1] if keep == 5 else [None])
