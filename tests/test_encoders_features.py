"""`compress_features`: given features on given grids, many inputs together, and specs that need no language model."""

from __future__ import annotations

import pytest
import torch

from trio.core.tokens import ImageTokens, Signal
from trio.encoders import compress_features
from trio.errors import InputError, UnknownNameError
from trio.spec import PipelineSpec


def rows(*tokens: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, width, generator=generator) for n in tokens]


GRIDS = [ImageTokens.from_grid(4, 5), ImageTokens.from_grid(6, 6), ImageTokens.from_grid(2, 3)]


@pytest.mark.parametrize("name", ["divprune", "uniform-grid", "average-pool", "random"])
def test_inputs_together_are_as_each_alone(name):
    features = rows(20, 36, 6)
    together = compress_features(features, GRIDS, name, keep=[5, 9, 6], seeds=[1, 2, 3])
    for at, count in enumerate([5, 9, 6]):
        (alone,) = compress_features([features[at]], GRIDS[at], name, keep=count, seeds=[at + 1])
        assert together[at].tokens == count
        assert torch.equal(together[at].token_index, alone.token_index)
        assert torch.equal(together[at].merge_map, alone.merge_map)
        torch.testing.assert_close(together[at].features, alone.features)


def test_dropping_keeps_rows_and_origins():
    features = rows(20, 36, 6)
    for kept, row, grid in zip(compress_features(features, GRIDS, "divprune-4"), features, GRIDS, strict=True):
        assert torch.equal(kept.features, row[kept.token_index])
        assert torch.equal(kept.origins.row, grid.row[kept.token_index])
        assert kept.merge_map[kept.token_index].tolist() == [0, 1, 2, 3]


def test_divprune_takes_the_farthest_left_each_time():
    (row,) = rows(20)
    unit = torch.nn.functional.normalize(row.double(), dim=1)
    distance = 1 - unit @ unit.T
    nearest_other = [min(float(distance[i, j]) for j in range(20) if j != i) for i in range(20)]
    chosen = [max(range(20), key=lambda i: nearest_other[i])]
    while len(chosen) < 7:
        left = [i for i in range(20) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    (kept,) = compress_features([row], GRIDS[0], "divprune-7")
    assert kept.token_index.tolist() == sorted(chosen)


def test_a_number_of_zero_leaves_nothing_and_all_leaves_all():
    none, whole, _ = compress_features(rows(20, 36, 6), GRIDS, "average-pool", keep=[0, 36, 1])
    assert none.tokens == 0 and none.merge_map.tolist() == [-1] * 20
    assert whole.token_index.tolist() == list(range(36))


def test_the_projector_sees_what_the_compressor_asks_for():
    features, weight = rows(20), torch.randn(8, 3)
    (before,) = compress_features(features, GRIDS[0], "divprune-4", project=lambda one: one @ weight)
    (given,) = compress_features([features[0] @ weight], GRIDS[0], "divprune-4")
    assert torch.equal(before.token_index, given.token_index)
    (after,) = compress_features(features, GRIDS[0], "average-pool-4", project=lambda one: one @ weight)
    (pooled,) = compress_features(features, GRIDS[0], "average-pool-4")
    torch.testing.assert_close(after.features, pooled.features @ weight)


def test_signals_are_asked_for_by_name():
    with pytest.raises(InputError, match=r"signals\[0\]: 'visionzip' reads attention of block -2"):
        compress_features(rows(20), GRIDS[0], "visionzip-4")
    signals = {Signal("attention", -2): torch.rand(20), Signal("keys", -2): torch.randn(20, 2, 4)}
    (kept,) = compress_features(rows(20), GRIDS[0], "visionzip-4", signals=[signals])
    assert kept.tokens == 4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": [4, 5]}, "keep: found 2 for 1 inputs"),
        ({"keep": [21]}, r"keep\[0\]: found 21; input 0 has 20 tokens"),
        ({"keep": "0%"}, "percentage above 0%"),
        ({}, "keep: missing"),
    ],
)
def test_wrong_numbers_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        compress_features(rows(20), GRIDS[0], "divprune", **options)


def test_rows_and_grids_must_fit():
    with pytest.raises(InputError, match=r"features\[0\]: found shape \(20, 8\) for origins of 36 tokens"):
        compress_features(rows(20), GRIDS[1], "divprune-4")
    with pytest.raises(UnknownNameError, match="divprun"):
        compress_features(rows(20), GRIDS[0], "divprun-4")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"compressor": {"name": "divprune", "keep": 4}}, ""),
        ({"compressor": {"name": "random", "keep": 4, "seed": 1}}, ""),
        ({"compressor": {"name": "random", "keep": 4}}, "draws, and no seed is written"),
        ({"stages": [{"after_layer": 2, "keep": 4}]}, "inside the language model"),
        (
            {"compressor": {"name": "divprune", "keep": 8}, "stages": [{"after_layer": 2, "keep": 4}]},
            "inside the language model",
        ),
        ({"compressor": {"name": "divprune", "keep": {"count": 4, "per": "sample"}}}, "per: image"),
    ],
)
def test_a_spec_says_whether_an_engine_can_decide_it_early(spec, reason):
    ready = PipelineSpec(**spec).engine_ready
    assert bool(ready) == (not reason)
    assert reason in ready.reason
