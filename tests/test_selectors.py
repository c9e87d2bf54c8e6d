"""Selectors against naive loops, on random and on degenerate features."""

from __future__ import annotations

from dataclasses import replace
from math import hypot, isnan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.core.context import SelectionContext
from trio.selectors.nms import NMS, suppress_at_once, suppress_in_blocks, unit_length
from trio.selectors.soft_nms import SoftNMS
from trio.selectors.top_k import TopK


def naive_nms(saliency: list[float], features: torch.Tensor, k: int, threshold: float) -> list[int]:
    """Straight from the description: visit by falling saliency, keep, suppress, fill up, raster order."""
    order = sorted(range(len(saliency)), key=lambda i: (-saliency[i], i))
    kept: list[int] = []
    suppressed: list[int] = []
    for i in order:
        if len(kept) == k:
            break
        if any(_cosine(features[i], features[j]) >= threshold for j in kept):
            suppressed.append(i)
        else:
            kept.append(i)
    kept += suppressed[: k - len(kept)]
    return sorted(kept)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else 0.0


def batch(groups: list[tuple[list[float], torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    most = max(len(s) for s, _ in groups)
    saliency = torch.full((len(groups), most), float("-inf"))
    features = torch.randn(len(groups), most, groups[0][1].shape[1])  # garbage where not valid
    valid = torch.zeros(len(groups), most, dtype=torch.bool)
    for g, (s, f) in enumerate(groups):
        saliency[g, : len(s)], features[g, : len(s)], valid[g, : len(s)] = torch.tensor(s), f, True
    return saliency, features, valid


def chosen(selector, saliency, features, k, valid, positions=None) -> list[list[int]]:
    """What a selector keeps; `positions`: row, column and image of each token, else not known."""
    ctx = SelectionContext.start(saliency, features, torch.tensor(k), valid)
    if positions is not None:
        row, column, image = positions.unbind(-1)
        ctx = replace(ctx, origins=replace(ctx.origins, row=row, column=column, image=image.long()))
    indices, there = selector.select(ctx)
    assert indices.dtype == torch.int64 and there.dtype == torch.bool and indices.shape == there.shape
    return [row[keep].tolist() for row, keep in zip(indices, there, strict=True)]


def clustered(n: int, seed: int, dims: int = 8, centres: int = 5) -> torch.Tensor:
    """Features with near-duplicates, their similarities away from the thresholds by more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dims, generator=generator)
    return middle[torch.randint(centres, (n,), generator=generator)] + 0.3 * torch.randn(n, dims, generator=generator)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(6))
def test_nms_equals_the_naive_loop_on_ragged_groups(threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, k = [150, 40, 1, 97], [30, 25, 1, 97]
    groups = [(torch.rand(n, generator=generator).tolist(), clustered(n, seed + n)) for n in sizes]
    got = chosen(NMS(threshold=threshold), *batch(groups)[:2], k, batch(groups)[2])
    for (saliency, features), count, indices in zip(groups, k, got, strict=True):
        assert indices == naive_nms(saliency, features, count, threshold)


DEGENERATE = {
    "all equal": lambda n: torch.ones(n, 4),
    "all opposite": lambda n: torch.ones(n, 4) * torch.tensor([1.0, -1.0]).repeat(n)[:n, None],
    "zeros": lambda n: torch.zeros(n, 4),
    "orthogonal": lambda n: torch.eye(n),
    "two directions": lambda n: torch.eye(4)[torch.arange(n) % 2],
    "some zeros": lambda n: torch.eye(4)[torch.arange(n) % 4] * (torch.arange(n) % 3 > 0)[:, None],
    "huge and tiny": lambda n: clustered(n, 3, 4) * torch.logspace(-15, 15, n)[:, None],
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("threshold", [-1.0, 0.8, 1.01])
@pytest.mark.parametrize("ties", [False, True])
def test_nms_on_degenerate_features(kind, threshold, ties):
    n = 70  # more than a block
    features = DEGENERATE[kind](n)
    saliency = [0.5] * n if ties else torch.rand(n, generator=torch.Generator().manual_seed(1)).tolist()
    for k in (0, 1, 7, 69, 70):
        got = chosen(
            NMS(threshold=threshold), *batch([(saliency, features)])[:2], [k], batch([(saliency, features)])[2]
        )
        assert got == [naive_nms(saliency, features, k, threshold)]


@given(st.integers(1, 90), st.integers(1, 5), st.floats(0.1, 0.99), st.integers(0, 10_000), st.data())
@settings(max_examples=60, deadline=None)
def test_nms_blocks_and_all_at_once_agree_and_are_greedy(n, groups, threshold, seed, data):
    generator = torch.Generator().manual_seed(seed)
    features = torch.stack([clustered(n, seed + g) for g in range(groups)])
    unit = unit_length(features)
    exists = torch.arange(n)[None] < torch.randint(1, n + 1, (groups, 1), generator=generator)
    k = torch.tensor([data.draw(st.integers(0, int(e.sum()))) for e in exists])
    thresholds = torch.full((groups,), threshold)
    at_once = suppress_at_once(unit, exists, thresholds)
    blocks = suppress_in_blocks(unit, exists, thresholds, k)
    for g in range(groups):
        first = at_once[g].nonzero().squeeze(1)[: int(k[g])]
        assert blocks[g].nonzero().squeeze(1).tolist() == first.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_centred_features_and_quantiles_equal_the_naive_loop(seed):
    """Features with a large common part: at 0.8 everything is alike, without the mean it is not."""
    generator = torch.Generator().manual_seed(seed)
    sizes, k = [60, 1, 33], [20, 1, 12]
    groups = [(torch.rand(n, generator=generator).tolist(), clustered(n, seed + n) + 20.0) for n in sizes]
    saliency, features, valid = batch(groups)
    plain = chosen(NMS(), saliency, features, k, valid)
    centre = chosen(NMS(centre=True), saliency, features, k, valid)
    quantile = chosen(NMS(quantile=0.9), saliency, features, k, valid)
    for (values, rows), count, one, two, three in zip(groups, k, plain, centre, quantile, strict=True):
        assert one == naive_nms(values, rows, count, 0.8)
        assert two == naive_nms(values, rows - rows.mean(0), count, 0.8)
        unit = rows / rows.norm(dim=-1, keepdim=True)
        pairs = sorted(float(unit[i] @ unit[j]) for i in range(len(rows)) for j in range(i))
        threshold = pairs[-(-(len(pairs) - 1) * 9 // 10)] - 1e-7 if pairs else 2.0
        assert three == naive_nms(values, rows, count, threshold)
    assert centre != plain


def naive_soft_nms(
    saliency: list[float], features: torch.Tensor, positions: torch.Tensor, k: int, weight: float, spread: float
) -> list[int]:
    """Straight from the description: always the largest relative saliency times distance to what is kept."""

    def distance(i: int, j: int) -> float:
        (y, x, image), (other_y, other_x, other) = positions[i].tolist(), positions[j].tolist()
        away = 1.0 if image != other else 0.0 if isnan(y + other_y) else min(1.0, hypot(y - other_y, x - other_x))
        return max(1 - _cosine(features[i], features[j]), 0.0) + spread * k / len(saliency) * away

    low, top = min(0.0, min(saliency)), max(saliency)
    span = top - low
    kept: list[int] = []
    while len(kept) < k:
        best, value = -1, -1.0
        for i in sorted(range(len(saliency)), key=lambda i: (-saliency[i], i)):
            if i in kept:
                continue
            share = (saliency[i] - low) / span if span > 0 else 0.0
            far = min((distance(i, j) for j in kept), default=9.0)
            score = share**weight * far
            if score > value + 1e-6:
                best, value = i, score
        kept.append(best)
    return sorted(kept)


@pytest.mark.parametrize("spread", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_soft_nms_equals_the_naive_loop_on_ragged_groups(weight, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, k = [60, 40, 1, 33], [20, 25, 1, 33]
    groups = [((torch.randn(n, generator=generator) + seed).tolist(), clustered(n, seed + n)) for n in sizes]
    positions = torch.rand(len(groups), 60, 3, generator=generator)
    positions[..., 2] = (positions[..., 2] * 2).floor()
    positions[:, ::9, :2] = float("nan")
    got = chosen(SoftNMS(weight=weight, spread=spread), *batch(groups)[:2], k, batch(groups)[2], positions)
    for (saliency, features), where, count, indices in zip(groups, positions, k, got, strict=True):
        assert indices == naive_soft_nms(saliency, features, where, count, weight, spread)


def test_soft_nms_keeps_what_looks_alike_where_it_is_far_apart():
    """Two things that look the same, in two corners of one image or on two images, and a background."""
    features = torch.eye(2)[torch.tensor([0, 0, 0, 0, 1])][None]
    saliency = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    row = torch.tensor([0.1, 0.1, 0.9, 0.1, 0.5])
    positions = torch.stack([row, row, torch.tensor([0.0, 0, 0, 1, 0])], 1)[None]
    arguments = (saliency, features, [4], torch.ones(1, 5, dtype=torch.bool))
    assert chosen(SoftNMS(spread=0.0), *arguments, positions) == [[0, 1, 2, 4]]  # by saliency alone
    assert chosen(SoftNMS(), *arguments, positions) == [[0, 2, 3, 4]]
    assert chosen(SoftNMS(), *arguments, torch.full_like(positions, float("nan"))) == [[0, 1, 2, 4]]


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("ties", [False, True])
def test_soft_nms_on_degenerate_features(kind, ties):
    n = 40
    features = DEGENERATE[kind](n)
    saliency = [0.5] * n if ties else torch.rand(n, generator=torch.Generator().manual_seed(1)).tolist()
    for k in (0, 1, 7, 40):
        (got,) = chosen(SoftNMS(), *batch([(saliency, features)])[:2], [k], batch([(saliency, features)])[2])
        assert len(got) == len(set(got)) == k and got == sorted(got)
    if kind == "two directions":
        (got,) = chosen(SoftNMS(), *batch([(saliency, features)])[:2], [2], batch([(saliency, features)])[2])
        assert {i % 2 for i in got} == {0, 1}  # one of each before any duplicate


def test_soft_nms_of_features_at_right_angles_is_top_k():
    saliency = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 50, dtype=torch.bool)
    arguments = (saliency, torch.eye(50).expand(3, -1, -1), [5, 11, 20], valid)
    for weight in (0.25, 1.0):
        assert chosen(SoftNMS(weight=weight), *arguments) == chosen(TopK(), *arguments)


def test_nms_groups_do_not_see_each_other():
    groups = [([0.3, 0.9, 0.1], torch.eye(3)), ([0.2, 0.8, 0.5, 0.4], torch.ones(4, 3))]
    together = chosen(NMS(), *batch(groups)[:2], [2, 2], batch(groups)[2])
    alone = [chosen(NMS(), *batch([g])[:2], [2], batch([g])[2])[0] for g in groups]
    assert together == alone == [[0, 1], [1, 2]]


def test_top_k_ties_and_raggedness():
    saliency = torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.1, 0.7, float("-inf"), float("-inf")]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    features = torch.zeros(2, 4, 1)
    assert chosen(TopK(), saliency, features, [3, 1], valid) == [[0, 1, 2], [1]]
    assert chosen(TopK(), saliency, features, [0, 2], valid) == [[], [0, 1]]


def test_valid_tokens_with_infinite_saliency_come_before_padding():
    saliency = torch.full((1, 4), float("-inf"))
    valid = torch.tensor([[False, True, True, False]])
    for selector in (TopK(), NMS(), SoftNMS()):
        assert chosen(selector, saliency, torch.eye(4)[None], [2], valid) == [[1, 2]]


def test_a_context_fills_in_what_is_not_given():
    ctx = SelectionContext.start(torch.rand(2, 3), torch.rand(2, 3, 4), torch.tensor([1, 2]))
    assert ctx.valid.all() and ctx.counts == (3, 3) and ctx.sizes.eq(1).all() and ctx.seeds == (0, 0)
    assert ctx.origins.row.isnan().all() and ctx.origins.grid_positions.shape == (2, 3, 2)
    assert ctx.origins.tile.isnan().all() and not ctx.origins.image.any()


def test_a_group_draws_the_same_numbers_in_any_batch_and_again():
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both = SelectionContext.start(torch.rand(2, 5), torch.rand(2, 5, 1), torch.tensor([1, 1]), valid, seeds=(7, 8))
    alone = SelectionContext.start(torch.rand(1, 3), torch.rand(1, 3, 1), torch.tensor([1]), seeds=(8,))
    assert torch.equal(both.random()[1, :3], alone.random()[0]) and not both.random()[1, 3:].any()
    assert torch.equal(both.random(), both.random()) and both.random()[0, :3].ne(both.random()[1, :3]).all()
    assert torch.equal(torch.rand(5, generator=both.generator(0)), both.random()[0])
