"""Every compressor against a naive implementation of its description, in indices and in features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import naive_compressors as naive
from support.naive_compressors import Kept, Tower

import trio
from trio.core.tokens import CLS, ImageTokens, Signal, VisualTokens
from trio.encoders.compressors.average_pool import AveragePool
from trio.encoders.compressors.base import Compressor
from trio.encoders.compressors.divprune import DivPrune
from trio.encoders.compressors.prumerge import PruMerge, outliers
from trio.encoders.compressors.random import RandomTokens
from trio.encoders.compressors.scan import Scan
from trio.encoders.compressors.uniform_grid import UniformGrid
from trio.encoders.compressors.visionzip import VisionZip
from trio.encoders.compressors.vispruner import VisPruner
from trio.encoders.reading.merge import merge, with_class

WIDTH = 16
GRIDS = [(8, 8), (6, 11), (13, 4), (1, 9), (3, 3), (2, 1)]
grids = pytest.mark.parametrize(("rows", "columns"), GRIDS)
towers = pytest.mark.parametrize("cls", [True, False], ids=["class token", "none"])
#: How many kinds of patches there are; 0: all different. Few kinds give exact ties in attention and in similarity.
kinds = pytest.mark.parametrize("levels", [0, 3])


def counts(n: int) -> list[int]:
    return sorted({1, min(2, n - 1), max(1, n // 4), n // 2, n - 1})


def draw_features(n: int, seed: int, levels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random; with levels, of a few kinds whose cosines are exact in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randn(levels, WIDTH, generator=generator).sign()[torch.arange(n) % levels].to(dtype)
    return torch.randn(n, WIDTH, generator=generator).to(dtype)


def tokens_for(
    compressor: Compressor, tower: Tower, rows: int, columns: int, *, seed: int = 0, levels: int = 0, cls: bool = False
) -> VisualTokens:
    """The signals that the compressor reads, taken from whole attention matrices."""
    signals = {}
    for one in compressor.reads():
        if one.kind == "attention":
            signals[one] = torch.tensor(tower.attention(one.layer, one_head=one.heads == "one"), dtype=torch.float32)
        else:
            signals[one] = tower.patch_keys(one.layer).float()
    features = draw_features(rows * columns, seed, levels)
    token = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99)) if cls else None
    return VisualTokens.start(features, ImageTokens.from_grid(rows, columns), signals, class_token=token, seed=seed)


def assert_same(out: VisualTokens, expected: Kept) -> None:
    assert out.token_index.tolist() == expected.places
    went = [None if to < 0 else int(out.token_index[to]) for to in out.merge_map.tolist()]
    assert went == expected.went
    torch.testing.assert_close(
        out.features.double(), torch.tensor(expected.features, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    assert out.sizes.tolist() == [max(1, went.count(place)) for place in expected.places]


@grids
@towers
@kinds
def test_visionzip(rows, columns, cls, levels):
    for seed, compressor in enumerate((VisionZip(), VisionZip(contextual=0.5), VisionZip(contextual=2))):
        tower = Tower(rows * columns, cls=cls, seed=seed, levels=levels)
        tokens = tokens_for(compressor, tower, rows, columns, seed=seed, levels=levels, cls=cls)
        token = tokens.cls.tolist() if cls else None
        for k in counts(tokens.tokens):
            expected = naive.visionzip(tower, tokens.features.tolist(), token, *compressor.split(k))
            assert_same(compressor.compress(tokens, k), expected)


def test_visionzip_splits_as_published():
    assert [VisionZip().split(k) for k in (192, 128, 64, 32)] == [(162, 30), (108, 20), (54, 10), (27, 5)]
    assert VisionZip(contextual=30).split(192) == (162, 30)
    assert VisionZip(contextual=30).split(20) == (1, 19)
    assert VisionZip().split(1) == (1, 0)
    with pytest.raises(trio.SpecError, match="contextual"):
        VisionZip(contextual=1.5)
    with pytest.raises(trio.SpecError, match="contextual"):
        VisionZip(contextual=-1)


def test_visionzip_leaves_the_class_token_out_where_it_is_told_to():
    tower = Tower(36, cls=True, seed=0)
    compressor = VisionZip(class_token=False)
    assert not compressor.wants_cls and VisionZip().wants_cls
    tokens = tokens_for(compressor, tower, 6, 6, cls=True)
    expected = naive.visionzip(tower, tokens.features.tolist(), None, *compressor.split(12))
    assert_same(compressor.compress(tokens, 12), expected)


def test_visionzip_mean():
    tower = Tower(36, cls=False, seed=1)
    added, mean = (VisionZip(contextual=4, combine=how) for how in ("add-mean", "mean"))
    tokens = tokens_for(added, tower, 6, 6)
    a, b = added.compress(tokens, 12), mean.compress(tokens, 12)
    assert torch.equal(a.merge_map, b.merge_map)
    for at in range(12):
        members = tokens.features[b.merge_map == at]
        torch.testing.assert_close(b.features[at], members.mean(0), rtol=1e-5, atol=1e-5)


@grids
@towers
@kinds
def test_scan(rows, columns, cls, levels):
    qwen = {"limit": "ceil", "local_layer": 0, "global_layer": -1}
    for window, seed in ((6, 0), (4, 1), (2, 2)):
        tower = Tower(rows * columns, cls=cls, seed=seed, levels=levels)
        for compressor, reference in (
            (Scan(window=window), naive.scan_by_top),
            (Scan(window=window, **qwen), naive.scan_by_rank),
        ):
            tokens = tokens_for(compressor, tower, rows, columns, seed=seed, levels=levels)
            for k in counts(tokens.tokens):
                expected = reference(tower, tokens.features.tolist(), rows, columns, k, window)
                assert_same(compressor.compress(tokens, k), expected)


def test_scan_of_a_tile_is_that_of_its_own_grid():
    tower, compressor = Tower(48, cls=True, seed=4), Scan(window=3)
    tokens = tokens_for(compressor, tower, 6, 8)
    there = replace(tokens.origins, row=tokens.origins.row + 7, column=tokens.origins.column + 8)
    out = compressor.compress(replace(tokens, origins=there), 20)
    assert out.token_index.tolist() == compressor.compress(tokens, 20).token_index.tolist()
    assert int(out.origins.row.min()) >= 7


def test_scan_without_a_merge_and_with_other_shares():
    tower = Tower(64, cls=True, seed=5)
    merged, dropping = Scan(window=4), Scan(window=4, merge=False)
    tokens = tokens_for(merged, tower, 8, 8)
    out = dropping.compress(tokens, 16)
    assert out.token_index.tolist() == merged.compress(tokens, 16).token_index.tolist()
    assert torch.equal(out.features, tokens.features[out.token_index]) and int((out.merge_map < 0).sum()) == 48
    for local, layer in ((0.0, -2), (1.0, 5)):
        only = Scan(local=local, window=8, merge=False).compress(tokens, 16).token_index.tolist()
        assert only == sorted(naive.by_falling(tower.attention(layer), list(range(64)))[:16])


@grids
@towers
@kinds
def test_vispruner(rows, columns, cls, levels):
    tower, compressor = Tower(rows * columns, cls=cls, seed=6, levels=levels), VisPruner()
    tokens = tokens_for(compressor, tower, rows, columns, levels=levels)
    for k in counts(tokens.tokens):
        assert_same(compressor.compress(tokens, k), naive.vispruner(tower, tokens.features.tolist(), k))


@grids
@kinds
def test_divprune(rows, columns, levels):
    for seed in range(3):
        tokens = tokens_for(DivPrune(), Tower(1, cls=False, seed=0), rows, columns, seed=seed, levels=levels)
        for k in counts(tokens.tokens):
            assert_same(DivPrune().compress(tokens, k), naive.divprune(tokens.features.tolist(), k))


@grids
@towers
@kinds
@pytest.mark.parametrize("plus", [False, True])
def test_prumerge(rows, columns, cls, levels, plus):
    compressor = PruMerge(plus=plus, neighbours=5)
    for seed in range(3):
        tower = Tower(rows * columns, cls=cls, seed=seed, levels=levels)
        tokens = tokens_for(compressor, tower, rows, columns, seed=seed, levels=levels)
        expected = naive.prumerge(tower, tokens.features.tolist(), plus_samples=plus, neighbours=5)
        assert_same(compressor.compress(tokens, tokens.tokens), expected)


def test_prumerge_decides_by_the_image():
    attention = torch.full((100,), 0.005) + torch.arange(100) * 1e-5
    every = torch.ones(1, 100, dtype=torch.bool)
    assert outliers(attention[None], every, [100]).tolist() == [[0]]
    attention[[7, 50, 93]] = 0.1
    assert outliers(attention[None], every, [100]).tolist() == [[3]]
    compressor = PruMerge()
    assert compressor.decides_count
    keys = torch.randn(100, 2, 4, generator=torch.Generator().manual_seed(0))
    signals = dict(zip(compressor.reads(), (attention, keys), strict=True))
    tokens = VisualTokens.start(draw_features(100, 0, 0), ImageTokens.from_grid(10, 10), signals)
    out = compressor.compress(tokens, 100)
    assert {7, 50, 93} < set(out.token_index.tolist()) and out.tokens == 4
    without = PruMerge(rest=False, neighbours=3).compress(tokens, 100)
    assert without.token_index.tolist() == [7, 50, 93] and int((without.merge_map < 0).sum()) >= 88
    assert PruMerge(share=0.25).compress(tokens, 100).tokens == 26


def test_average_pool_is_average_pooling_where_cells_fit():
    tokens = VisualTokens.start(draw_features(576, 0, 0), ImageTokens.from_grid(24, 24))
    image = tokens.features.T.reshape(1, WIDTH, 24, 24)
    for side in (2, 4, 8, 12):
        expected = torch.nn.functional.avg_pool2d(image, 24 // side)[0].flatten(1).T
        torch.testing.assert_close(AveragePool().compress(tokens, side**2).features, expected, rtol=1e-5, atol=1e-6)


@grids
def test_floors_on_a_grid_share_their_cells(rows, columns):
    """Any count, exactly; the grid keeps what stands in the middle of what the pool averages."""
    tokens = VisualTokens.start(draw_features(rows * columns, 0, 0), ImageTokens.from_grid(rows, columns))
    for k in range(1, tokens.tokens):
        pooled, kept = AveragePool().compress(tokens, k), UniformGrid().compress(tokens, k)
        assert pooled.token_index.tolist() == kept.token_index.tolist() and kept.tokens == k
        assert torch.equal(kept.features, tokens.features[kept.token_index])
        for at in range(k):
            mean = tokens.features[pooled.merge_map == at].mean(0)
            torch.testing.assert_close(pooled.features[at], mean, rtol=1e-5, atol=1e-5)


def test_random_is_uniform_nested_and_the_image_s_own():
    tokens = VisualTokens.start(draw_features(100, 0, 0), ImageTokens.from_grid(10, 10), seed=1)
    chosen = RandomTokens().compress(tokens, 40).token_index.tolist()
    assert chosen == RandomTokens().compress(tokens, 40).token_index.tolist()
    assert set(RandomTokens().compress(tokens, 10).token_index.tolist()) < set(chosen)
    in_two_steps = RandomTokens().compress(RandomTokens().compress(tokens, 60), 40)
    assert in_two_steps.token_index.tolist() == chosen
    assert chosen != RandomTokens(seed=1).compress(tokens, 40).token_index.tolist()
    assert chosen != RandomTokens().compress(replace(tokens, seed=2), 40).token_index.tolist()
    often = torch.zeros(100)
    for seed in range(400):
        often[RandomTokens().compress(replace(tokens, seed=seed), 25).token_index] += 1
    assert float(often.min()) > 60 and float(often.max()) < 145  # 100 expected, deviation 8.7


ALL = ["visionzip", "scan", "vispruner", "divprune", "uniform-grid", "average-pool", "random"]


@pytest.mark.parametrize("name", ALL)
def test_as_many_as_there_are_changes_nothing(name):
    compressor = trio.COMPRESSORS.build(name)
    tokens = tokens_for(compressor, Tower(30, cls=True, seed=0), 5, 6, cls=True)
    out = compressor.compress(tokens, 30)
    assert out is tokens


@pytest.mark.parametrize("name", [*ALL, "prumerge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_as_float32_on_the_same_numbers(name, dtype):
    """Similarities and means are computed in float32: only the result is rounded."""
    compressor = trio.COMPRESSORS.build(name)
    tokens = tokens_for(compressor, Tower(48, cls=True, seed=0), 6, 8, cls=True)
    halved = replace(tokens, features=tokens.features.to(dtype), cls=tokens.cls.to(dtype))
    k = 48 if compressor.decides_count else 12
    out = compressor.compress(halved, k)
    reference = compressor.compress(replace(halved, features=halved.features.float(), cls=halved.cls.float()), k)
    assert out.features.dtype == dtype and torch.equal(out.merge_map, reference.merge_map)
    assert torch.equal(out.features, reference.features.to(dtype))


@pytest.mark.parametrize("name", [*ALL, "prumerge"])
def test_a_class_token_that_was_kept_stays(name):
    """As one of the k, and apart from what the method does to the patches."""
    compressor = trio.COMPRESSORS.build(name)
    tower = Tower(30, cls=True, seed=3)
    patches = tokens_for(compressor, tower, 5, 6)
    first = torch.arange(float(WIDTH))
    tokens = with_class(patches, first)
    k = tokens.tokens if compressor.decides_count else 10
    out, alone = compressor.compress(tokens, k), compressor.compress(patches, 30 if compressor.decides_count else 9)
    assert out.token_index.tolist() == [-1, *alone.token_index.tolist()] and int(out.origins.kind[0]) == CLS
    assert torch.equal(out.features, torch.cat([first[None], alone.features]))
    assert torch.equal(out.merge_map, torch.where(alone.merge_map < 0, -1, alone.merge_map + 1))
    if not compressor.decides_count:
        only = compressor.compress(tokens, 1)
        assert only.token_index.tolist() == [-1] and bool((only.merge_map == -1).all())


def test_sizes_count_in_what_is_merged_later():
    """Two tokens merged before weigh twice: the same features as those of the tokens of the start."""
    compressor = Scan(window=2)
    tokens = tokens_for(compressor, Tower(16, cls=True, seed=8), 4, 4)
    doubled = tokens.features[torch.arange(16) // 2 * 2]  # pairs of equal tokens
    pairs = merge(replace(tokens, features=doubled), torch.arange(0, 16, 2), torch.arange(16) // 2)
    out = compressor.compress(pairs, 3)
    for at in range(3):
        torch.testing.assert_close(out.features[at], doubled[out.merge_map == at].mean(0), rtol=1e-5, atol=1e-5)
        assert float(out.sizes[at]) == float((out.merge_map == at).sum())


def test_what_is_read():
    attention, keys = Signal("attention", -2), Signal("keys", -2)
    assert VisionZip().reads() == (attention, keys)
    assert Scan().reads() == (Signal("attention", 5), attention)
    assert VisPruner().reads() == (attention,)
    assert PruMerge().reads() == (Signal("attention", -1, "one"), Signal("keys", -1))
    for silent in (DivPrune, AveragePool, UniformGrid, RandomTokens):
        assert silent().reads() == ()
    assert [name for name in ALL if trio.COMPRESSORS.get(name).space == "language"] == ["scan", "divprune"]
