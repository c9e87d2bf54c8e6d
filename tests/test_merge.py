"""Merging: sizes, maps, means, and two merges in a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.core.tokens import CLS, MERGED, PATCH, ImageTokens, Signal, VisualTokens
from trio.encoders.reading.grid import cells, windows
from trio.encoders.reading.merge import (
    group_mean,
    keep,
    largest,
    leaders_lead,
    merge,
    most_similar,
    ranking,
    with_class,
    without_class,
)

ATTENTION, KEYS, CLASS = Signal("attention", -2), Signal("keys", -2), Signal("cls", -1)


def tokens_of(n: int, seed: int = 0, *, rows: int = 1, dtype: torch.dtype = torch.float32, **more) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    signals = {
        ATTENTION: torch.rand(n, generator=generator),
        KEYS: torch.randn(n, 2, 3, generator=generator),
        CLASS: torch.randn(5, generator=generator),
    }
    features = torch.randn(n, 5, generator=generator).to(dtype)
    return VisualTokens.start(features, ImageTokens.from_grid(rows, n // rows), signals, **more)


def draw_groups(n: int, seed: int, *, drop: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Random leaders, and every other token in a random group or dropped."""
    generator = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, n + 1, (), generator=generator))
    leaders = torch.randperm(n, generator=generator)[:m].sort().values
    into = torch.randint(-1 if drop else 0, m, (n,), generator=generator)
    return leaders, leaders_lead(into, leaders)


def same(a: VisualTokens, b: VisualTokens) -> None:
    for name in ("sizes", "token_index", "merge_map"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.features, b.features, rtol=1e-5, atol=1e-5)
    for signal in a.signals:
        torch.testing.assert_close(a.signals[signal], b.signals[signal], rtol=1e-5, atol=1e-5)
    for name in ("kind", "frame", "row", "column", "size"):
        assert torch.equal(getattr(a.origins, name), getattr(b.origins, name)), name


@given(st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_sizes_sum_to_the_kept_mass_and_follow_the_map(n, seed):
    tokens = tokens_of(n, seed)
    out = merge(tokens, *draw_groups(n, seed))
    assert float(out.sizes.sum()) == int((out.merge_map >= 0).sum())
    assert torch.equal(torch.bincount(out.merge_map[out.merge_map >= 0], minlength=out.tokens).float(), out.sizes)
    assert torch.equal(out.origins.size, out.sizes.long())
    assert torch.equal(out.merge_map[out.token_index], torch.arange(out.tokens))


@given(st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_two_merges_are_one_merge_with_the_composed_map(n, seed):
    tokens = tokens_of(n, seed)
    leaders, into = draw_groups(n, seed)
    once = merge(tokens, leaders, into)
    again, further = draw_groups(once.tokens, seed + 1)
    composed = torch.where(into < 0, -1, further[into.clamp_min(0)])
    same(merge(once, again, further), merge(tokens, leaders[again], composed))


@given(st.integers(2, 30), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_keeping_is_merging_alone_and_every_token_of_the_start_counts_the_same(n, seed):
    tokens = tokens_of(n, seed)
    leaders, _ = draw_groups(n, seed)
    alone = leaders_lead(torch.full((n,), -1), leaders)
    same(keep(tokens, leaders), merge(tokens, leaders, alone))
    # In whatever order tokens are merged into one, it is their mean.
    once = merge(tokens, *draw_groups(n, seed, drop=False))
    one = merge(once, torch.zeros(1, dtype=torch.int64), torch.zeros(once.tokens, dtype=torch.int64))
    torch.testing.assert_close(one.features[0], tokens.features.mean(0), rtol=1e-5, atol=1e-5)
    assert float(one.sizes) == n


@given(st.integers(2, 30), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_order_of_members_does_not_matter(n, seed):
    generator = torch.Generator().manual_seed(seed)
    values, weights = torch.randn(n, 4, generator=generator), torch.rand(n, generator=generator) + 0.5
    leaders, into = draw_groups(n, seed)
    order = torch.randperm(n, generator=generator)
    there = order.argsort()[leaders]
    torch.testing.assert_close(
        group_mean(values, weights, into, leaders),
        group_mean(values[order], weights[order], into[order], there),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_mean_by_hand():
    tokens = replace(
        tokens_of(4), features=torch.tensor([[0.0], [2.0], [8.0], [5.0]]), sizes=torch.tensor([1.0, 3, 1, 1])
    )
    out = merge(tokens, torch.tensor([1, 3]), torch.tensor([0, 0, -1, 1]))
    assert out.features.tolist() == [[1.5], [5.0]] and out.sizes.tolist() == [4.0, 1.0]
    assert out.token_index.tolist() == [1, 3] and out.merge_map.tolist() == [0, 0, -1, 1]
    assert out.origins.kind.tolist() == [MERGED, PATCH] and out.origins.column.tolist() == [1, 3]
    assert torch.equal(out.signals[CLASS], tokens.signals[CLASS])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_token_alone_keeps_its_bits_and_sums_do_not_overflow(dtype):
    tokens = tokens_of(300, dtype=dtype)
    big = replace(tokens, features=torch.full_like(tokens.features, 6e4 if dtype == torch.float16 else 1e30))
    every = torch.zeros(300, dtype=torch.int64)
    torch.testing.assert_close(merge(big, every[:1], every).features, big.features[:1])
    leaders = torch.arange(0, 300, 3)
    out = merge(tokens, leaders, leaders_lead(torch.full((300,), -1), leaders))
    assert out.features.dtype == dtype and torch.equal(out.features, tokens.features[leaders])


def test_the_class_token_goes_before_and_away_again():
    tokens = tokens_of(4, class_token=torch.arange(5.0), seed=7)
    with_it = with_class(tokens, torch.arange(5.0))
    assert with_it.tokens == 5 and with_it.cls is None and with_it.seed == tokens.seed
    assert with_it.token_index.tolist() == [-1, 0, 1, 2, 3] and with_it.merge_map.tolist() == [1, 2, 3, 4]
    assert with_it.sizes.tolist() == [1.0] * 5 and with_it.origins.kind.tolist() == [CLS, *[PATCH] * 4]
    assert torch.equal(with_it.features[0], torch.arange(5.0)) and float(with_it.signals[ATTENTION][0]) == 0
    same(without_class(with_it), tokens)


def test_ties_go_to_the_lower_index():
    values = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert ranking(values).tolist() == [1, 2, 4, 3, 0]
    assert largest(values, 2).tolist() == [1, 2]
    targets = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])
    assert most_similar(torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 0.0]]), targets).tolist() == [1, 0, 0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.data())
@settings(max_examples=150, deadline=None)
def test_cells_are_k_and_nearly_equal(rows, columns, seed, data):
    """On any grid, with tokens missing too: every cell holds its own middle."""
    origins = ImageTokens.from_grid(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, rows * columns + 1, (), generator=generator)) if seed % 2 else rows * columns
    origins = origins.select(torch.randperm(rows * columns, generator=generator)[:n].sort().values)
    k = data.draw(st.integers(1, n))
    middles, into = cells(origins, k)
    assert len(middles) == k and torch.equal(into[middles], torch.arange(k)) and bool((middles.diff() > 0).all())
    assert torch.bincount(into, minlength=k).min() >= 1
    for cell in range(k):
        inside = (into == cell).nonzero().squeeze(1).tolist()
        row, column = (sum(float(axis[i]) for i in inside) / len(inside) for axis in (origins.row, origins.column))
        away = [(float(origins.row[i]) - row) ** 2 + (float(origins.column[i]) - column) ** 2 for i in inside]
        assert away[inside.index(int(middles[cell]))] == pytest.approx(min(away), abs=1e-5)
    if n == rows * columns:
        bands = {tuple(sorted(set(origins.row[into == cell].tolist()))) for cell in range(k)}
        assert len({row for band in bands for row in band}) == rows


@pytest.mark.parametrize("side", [2, 3, 4, 6, 12])
def test_cells_that_fit_are_squares(side):
    origins = ImageTokens.from_grid(24, 24)
    _, into = cells(origins, side * side)
    assert torch.equal(into, origins.row * side // 24 * side + origins.column * side // 24)


def test_cells_of_frames_are_those_of_one_tall_image():
    frames, tall = ImageTokens.from_grid(4, 6, frames=3), ImageTokens.from_grid(12, 6)
    for k in (1, 3, 7, 18, 71):
        assert all(torch.equal(a, b) for a, b in zip(cells(frames, k), cells(tall, k), strict=True))


def test_windows_join_what_is_left_over():
    origins = ImageTokens.from_grid(9, 14)
    shifted = replace(origins, row=origins.row + 24, column=origins.column + 7)
    for one in (origins, shifted):
        window, count = windows(one, 4)
        assert count == 2 * 3
        naive = [min(r // 4, 1) * 3 + min(c // 4, 2) for r in range(9) for c in range(14)]
        assert window.tolist() == naive
    window, count = windows(ImageTokens.from_grid(4, 4, frames=2), 2)
    assert count == 8 and window.tolist() == [
        f * 4 + r // 2 * 2 + c // 2 for f in (0, 1) for r in range(4) for c in range(4)
    ]
    window, count = windows(ImageTokens.from_grid(3, 5), 6)
    assert count == 1 and not window.any()
