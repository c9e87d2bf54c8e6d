"""Selectors against naive loops, on random and on degenerate features."""

from __future__ import annotations

from dataclasses import replace
from math import hypot, isnan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import inputs, llava
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import trio
from trio.core import greedy
from trio.core.context import SelectionContext, TokenOrigins
from trio.cost import published_shape
from trio.selectors import nms
from trio.selectors.base import SELECTORS
from trio.selectors.nms import NMS
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
def test_suppression_in_blocks_is_greedy(n, groups, threshold, seed, data):
    """Against the fixed point of "kept unless near a better one that is kept", from all pairs."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.stack([clustered(n, seed + g) for g in range(groups)]), dim=-1)
    exists = torch.arange(n)[None] < torch.randint(1, n + 1, (groups, 1), generator=generator)
    k = [data.draw(st.integers(0, int(e.sum()))) for e in exists]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "BLOCK", data.draw(st.sampled_from([1, 7, 64, 256])))
        blocks = torch.from_numpy(nms.suppress(unit, exists, threshold, k).kept)
    near = (unit @ unit.transpose(1, 2) >= threshold).triu(1)
    kept = exists
    for _ in range(n):
        kept = exists & ~(near & kept[..., None]).any(1)
    for g in range(groups):
        assert blocks[g].nonzero().squeeze(1).tolist() == kept[g].nonzero().squeeze(1)[: k[g]].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_centred_features_equal_the_naive_loop(seed):
    """Features with a large common part: at 0.8 everything is alike, without the mean it is not."""
    generator = torch.Generator().manual_seed(seed)
    sizes, k = [60, 1, 33], [20, 1, 12]
    groups = [(torch.rand(n, generator=generator).tolist(), clustered(n, seed + n) + 20.0) for n in sizes]
    saliency, features, valid = batch(groups)
    plain = chosen(NMS(), saliency, features, k, valid)
    centre = chosen(NMS(centre=True), saliency, features, k, valid)
    for (values, rows), count, one, two in zip(groups, k, plain, centre, strict=True):
        assert one == naive_nms(values, rows, count, 0.8)
        assert two == naive_nms(values, rows - rows.mean(0), count, 0.8)
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


def all_pairs(ctx: SelectionContext, group: int, weight: float, spread: float) -> list[int]:
    """Soft-nms from all pairs in float64: the rule as it is written down, for larger sizes."""
    n, k = ctx.counts[group], int(ctx.k[group])
    saliency = ctx.saliency[group, :n].double().numpy()
    rows = ctx.features[group, :n].double().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    apart = np.maximum(1.0 - rows @ rows.T, 0.0)
    y, x, image = (v[group, :n].double().numpy() for v in (ctx.origins.row, ctx.origins.column, ctx.origins.image))
    away = np.minimum(np.nan_to_num(np.hypot(y[:, None] - y, x[:, None] - x)), 1.0)
    apart += spread * k / n * np.where(image[:, None] != image, 1.0, away)
    low = min(0.0, saliency.min())
    weights = ((saliency - low) / max(saliency.max() - low, 1e-300)) ** weight
    by_saliency = np.argsort(-saliency, kind="stable")
    nearest, kept = np.full(n, 9.0), np.zeros(n, dtype=bool)
    for _ in range(k):
        score = np.where(kept, -1.0, weights * nearest)[by_saliency]
        best = by_saliency[int((score >= score.max() - 1e-6).argmax())]
        kept[best], nearest = True, np.minimum(nearest, apart[best])
    return kept.nonzero()[0].tolist()


def large(n: int, k: list[int], seed: int, *, levels: int | None = None, width: int = 16) -> SelectionContext:
    """Ragged groups of tokens on a square image, in clusters; with `levels`, features and saliencies tie."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.stack([clustered(n, seed + g, width, n // 8) for g in range(len(k))])
    saliency = torch.rand(len(k), n, generator=generator) ** 3
    if levels is not None:
        features, saliency = torch.eye(width)[features.argmax(-1)], (saliency * levels).round()
    counts = torch.tensor([n - 37 * g for g in range(len(k))])
    valid = torch.arange(n)[None] < counts[:, None]
    side = int(n**0.5) + 1
    row, column = (torch.arange(n) // side + 0.5) / side, (torch.arange(n) % side + 0.5) / side
    zero = torch.zeros(len(k), n, dtype=torch.int64)
    origins = TokenOrigins(row.expand(len(k), -1), column.expand(len(k), -1), zero, zero, zero)
    ctx = SelectionContext.start(saliency.masked_fill(~valid, -torch.inf), features, torch.tensor(k), valid)
    return replace(ctx, origins=origins)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_soft_nms_in_blocks_keeps_what_all_pairs_keep(weight, spread):
    for seed in range(2):
        ctx = large(700, [70, 200, 1, 589], seed)
        indices, there = SoftNMS(weight=weight, spread=spread).select(ctx)
        for g in range(4):
            assert indices[g][there[g]].tolist() == all_pairs(ctx, g, weight, spread)


@pytest.mark.parametrize("block", [1, 5, 128])
def test_soft_nms_in_blocks_keeps_the_lower_one_of_equal_tokens(block, monkeypatch):
    """Sixteen directions and four saliencies: after sixteen tokens every score is equal, zero or not."""
    monkeypatch.setattr(greedy, "BLOCK", block)
    for weight in (0.0, 0.25):
        ctx = large(300, [12, 40, 100], 3, levels=3)
        indices, there = SoftNMS(weight=weight, spread=0.0).select(ctx)
        for g in range(3):
            assert indices[g][there[g]].tolist() == all_pairs(ctx, g, weight, 0.0)


class Operators(TorchDispatchMode):
    """Counts the operators that are not views, and remembers the largest tensor that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        self.largest = max(self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize(("n", "k"), [(576, 64), (576, 192), (2880, 320), (2880, 960)])
def test_selectors_launch_a_bounded_number_of_operators(n, k, monkeypatch):
    """At most 40 and 15 a round of k / 32 + 8 rounds, whatever the groups; waits: one a round."""
    for groups in (1, 4):
        ctx = large(n, [k] * groups, 0, width=64)
        for selector, module, step in ((SoftNMS(), greedy, "_within"), (NMS(), nms, "_survivors")):
            rounds, inner = [], getattr(module, step)
            monkeypatch.setattr(module, step, lambda *given, r=rounds, f=inner: r.append(1) or f(*given))
            with Operators() as operators:
                selector.select(ctx)
            monkeypatch.undo()
            assert len(rounds) <= k / 32 + 8
            assert operators.count <= 40 + 15 * (k / 32 + 8)


@pytest.mark.parametrize("selector", [SoftNMS(), NMS()])
def test_selectors_compute_about_the_products_that_they_say(selector):
    """Within a half, where not all tokens fit into one block; `nms` fewer where it runs out of tokens that differ."""
    shape = published_shape("llava-next-7b").model_copy(update={"hidden": 64})
    for n, k in ((576, 64), (2880, 320), (2880, 960)):
        with FlopCounterMode(display=False) as counter:
            selector.select(large(n, [k], 0, width=64))
        said = selector.flops(shape, tokens=n + 60, visual=n, keep=k)
        assert (0.5 if isinstance(selector, SoftNMS) else 0.1) < counter.get_total_flops() / said < 1.5


def test_selectors_never_hold_all_pairs():
    n, width = 6000, 16
    ctx = large(n, [100], 0, width=width)
    for selector in (SoftNMS(), NMS(), NMS(threshold=-1.0), NMS(threshold=1.01)):
        with Operators() as operators:
            selector.select(ctx)
        assert operators.largest <= 2 * nms.BLOCK * n < n * n / 10


def test_similarities_are_exact_where_the_process_allows_less():
    allowed = torch.get_float32_matmul_precision()
    ctx = large(300, [40], 1)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in str(func):
                seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    try:
        torch.set_float32_matmul_precision("medium")
        with Watch():
            for selector in (SoftNMS(), NMS()):
                selector.select(ctx)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert seen and set(seen) == {"highest"}


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


# Waiting for the device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTORS.names())
def test_a_selector_says_whether_it_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[int, ...]] = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x, *args, **more: copies.append(x.shape) or to_host(x))
    generator = torch.Generator().manual_seed(0)
    saliency, features = torch.rand(2, 40, generator=generator), torch.randn(2, 40, 8, generator=generator)
    SELECTORS.build(name).select(SelectionContext.start(saliency, features, torch.tensor([5, 9])))
    assert bool(copies) == SELECTORS.get(name).waits


def test_a_report_says_which_selectors_wait_for_an_accelerator() -> None:
    stages = [
        {"after_layer": 0, "keep": "50%", "scorer": "random"},
        {"after_layer": 1, "keep": "30%", "scorer": "random", "selector": "nms"},
        {"after_layer": 2, "keep": "20%", "scorer": "random", "selector": "top-k"},
    ]
    model = llava()
    pipeline = trio.Pipeline(model, stages=stages)
    with pipeline, torch.no_grad():
        model(**inputs([["image", 3, 4]]))
    assert pipeline.report.notes == []  # a processor is the host
    model.to("meta")  # stands in for an accelerator: a device other than the host's
    soft, hard = pipeline.report.notes
    assert soft.startswith("selector soft-nms (after layer 0) ") and "waits for the device (meta)" in soft
    assert hard.startswith("selector nms (after layer 1) ")
