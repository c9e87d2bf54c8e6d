"""Compressors on many inputs at once: what each makes of an input alone, and as many operations whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.operators import Operators

import trio
from benchmarks.counting import count
from trio.core.token_batch import TokenBatch
from trio.core.tokens import ImageTokens, Signal, VisualTokens
from trio.encoders.compressors.base import BatchCompressor, Compressor
from trio.encoders.reading.duplicates import distinct

WIDTH, HEADS, HEAD_DIM = 24, 4, 8
SHAPES = [(6, 6), (3, 9), (6, 6), (1, 1), (12, 7), (1, 2), (5, 1)]
NAMES = [name for name in trio.COMPRESSORS.names() if issubclass(trio.COMPRESSORS.get(name), BatchCompressor)]
#: Parameters beside the defaults that take other ways through the code.
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("visionzip", {"contextual": 0}),
    ("visionzip", {"contextual": 0.5, "combine": "mean", "class_token": False}),
    ("scan", {"window": 3, "limit": "ceil"}),
    ("scan", {"window": 2, "merge": False, "local": 1.0}),
    ("vispruner", {"important": 0.0, "remove": 3}),
    ("vispruner", {"important": 1.0}),
    ("prumerge", {"plus": True, "neighbours": 5}),
    ("prumerge", {"share": 0.25, "rest": False}),
    ("prumerge", {"share": 1.0}),
]


def signal(one: Signal, n: int, generator: torch.Generator, levels: int) -> torch.Tensor:
    if one.kind == "attention":
        values = torch.randn(n, generator=generator).mul(2).softmax(0)
        return values.mul(40 * n).round().div(64 * n) if levels else values
    if one.kind == "groups":
        leads = torch.randint(0, n, (n,), generator=generator)
        return torch.minimum(leads, torch.arange(n)).where(torch.rand(n, generator=generator) < 0.4, torch.arange(n))
    return torch.randn(n, HEADS, HEAD_DIM, generator=generator)


def draw(
    compressor: Compressor, shapes: Sequence[tuple[int, int]], *, levels: int = 0, device: str = "cpu"
) -> list[VisualTokens]:
    """Inputs of the given rows and columns; with levels, of a few kinds, so that there are ties."""
    tokens = []
    for seed, (rows, columns) in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        n = rows * columns
        signals = {one: signal(one, n, generator, levels) for one in compressor.reads()}
        for one, value in signals.items():
            if one.kind == "groups":  # the first token of a group has its own number
                while not torch.equal(value, value[value]):
                    value = value[value]
                signals[one] = value
        features = torch.randn(n, WIDTH, generator=generator)
        if levels:
            features = features[:levels].sign()[torch.arange(n) % min(levels, n)]
        cls = torch.randn(WIDTH, generator=generator)
        origins = ImageTokens.from_grid(rows, columns)
        origins = replace(origins, row=origins.row + seed, grids=((rows + seed, columns),))
        there = {one: value.to(device) for one, value in signals.items()}
        tokens.append(
            VisualTokens.start(
                features.to(device),
                origins,
                there,
                class_token=cls.to(device) if compressor.wants_cls else None,
                seed=seed,
            )
        )
    return tokens


@pytest.mark.parametrize("levels", [0, 3], ids=["", "ties"])
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)])
def test_an_input_in_a_batch_is_what_it_is_alone(name, parameters, levels):
    """Ragged inputs with counts of their own, in two orders."""
    compressor = trio.COMPRESSORS.build({"name": name, **parameters})
    tokens = draw(compressor, SHAPES, levels=levels)
    for part in (1, 3, 1.4):
        counts = [max(1, int(one.tokens / part) - (part == 1)) for one in tokens]
        if compressor.decides_count:
            counts = [one.tokens for one in tokens]
        alone = [compressor.compress(one, k) for one, k in zip(tokens, counts, strict=True)]
        for order in (range(len(tokens)), (4, 0, 3)):
            # `compress` gives inputs of which nothing goes back as they are: they never reach the method.
            members = [at for at in order if counts[at] < tokens[at].tokens or compressor.decides_count]
            batch = TokenBatch.stack([tokens[at] for at in members])
            batch = replace(batch, features=poisoned(batch.features, batch.valid))
            found = compressor.compress_batch(batch, [counts[at] for at in members]).unstack()
            for at, one in zip(members, found, strict=True):
                assert_same(one, alone[at])


def poisoned(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Huge at padding, which must have no influence."""
    return values.masked_fill(~valid[..., None], 1e30)


def assert_same(found: VisualTokens, expected: VisualTokens) -> None:
    for name in ("sizes", "token_index", "merge_map"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("kind", "frame", "row", "column", "size"):
        assert torch.equal(getattr(found.origins, name), getattr(expected.origins, name)), name
    assert found.origins.grids == expected.origins.grids and found.seed == expected.seed
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    assert found.signals.keys() == expected.signals.keys()
    for one, value in found.signals.items():
        torch.testing.assert_close(value, expected.signals[one], rtol=1e-5, atol=1e-5)


def test_a_compressor_of_one_input_works_on_a_batch():
    """The default: one after the other."""

    class Half(Compressor):
        def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
            from trio.encoders.reading.merge import keep

            return keep(tokens, torch.arange(k))

    tokens = draw(Half(), SHAPES)
    counts = [max(1, one.tokens // 2) for one in tokens]
    found = Half().compress_batch(TokenBatch.stack(tokens), counts).unstack()
    for one, whole, k in zip(found, tokens, counts, strict=True):
        assert_same(one, Half().compress(whole, k))


#: Launches of a compressor.
MOST = 150


@pytest.mark.parametrize("name", [name for name in NAMES if name != "vispruner"])
def test_launches_do_not_grow_with_the_batch(name):
    """576 patches to 64, as many launches for 40 ragged tiles as for 5, and one or two looks at values."""
    compressor = trio.COMPRESSORS.build(name)
    seen = []
    ragged = [(24, 24), (24, 18), (20, 24), (24, 24), (13, 24)]
    for shapes in ([(24, 24)], ragged, ragged * 8):
        batch = TokenBatch.stack(draw(compressor, shapes, device="meta"))
        k = list(batch.counts) if compressor.decides_count else [64] * len(shapes)
        with Operators() as operators:
            compressor.compress_batch(batch, k)
        assert operators.downloads <= 2 or name == "divprune"  # which looks once a round
        seen.append(operators.launches)
    assert seen[1] <= seen[0] + 12, seen  # inputs of one length need no masks
    assert seen[2] <= seen[1], seen
    assert seen[2] <= MOST, seen


@pytest.mark.parametrize(("inputs", "tokens", "k"), [(1, 576, 64), (40, 576, 12), (1, 2880, 32)])
def test_duplicates_are_taken_away_in_few_launches(monkeypatch, inputs, tokens, k):
    """They go by values: on the meta device, where all are alike, the loop would not get far."""
    monkeypatch.setattr("trio.encoders.reading.blocks.block_bytes", lambda features: 2**28)
    unit = torch.nn.functional.normalize(torch.randn(inputs, tokens, WIDTH, generator=torch.Generator().manual_seed(0)))
    order = torch.arange(tokens).expand(inputs, -1)
    assert count(lambda: distinct(unit, order, [tokens] * inputs, [k] * inputs, 8)).launches <= 100


@pytest.mark.parametrize("apart", [False, True], ids=["mixed", "apart"])
def test_duplicates_are_taken_away_one_round_after_the_other(apart):
    """Against the rule, word by word; apart: at first the most similar tokens are all in the same half."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(300) % 2 if apart else torch.randint(0, 9, (300,), generator=generator)
    # Whole numbers, whose products are exact: the rule depends on every bit, and ties go to the earlier token.
    unit = torch.randn(9, 64, generator=generator)[kind] + 0.4 * torch.randn(300, 64, generator=generator)
    unit = (9 * unit).round()
    tokens = torch.arange(300) if apart else torch.randperm(300, generator=generator)
    found = distinct(unit[None], tokens[None], [300], [20], 8)[0]
    left, likeness = tokens.tolist(), (unit.double() @ unit.double().T).tolist()
    while len(left) > 20:
        a, b = left[::2], left[1::2]
        best = {i: max(likeness[i][j] for j in b) for i in a}
        left = sorted(a, key=lambda i: -best[i])[min(8, len(left) - 20) :] + b
    assert sorted(left) == found.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("name", ["divprune", "tome", "vispruner", "scan"])
def test_blocks_of_rows_change_nothing(monkeypatch, name):
    """Where similarities of all pairs are not held."""
    compressor = trio.COMPRESSORS.build(name)
    tokens = draw(compressor, SHAPES)
    counts = [max(1, one.tokens // 3) for one in tokens]
    alone = [compressor.compress(one, k) for one, k in zip(tokens, counts, strict=True)]
    monkeypatch.setattr("trio.encoders.reading.blocks.FEWEST_ROWS", 5)
    monkeypatch.setattr("trio.encoders.reading.blocks.block_bytes", lambda features: 0)
    for one, expected in zip(compressor.compress_batch(TokenBatch.stack(tokens), counts).unstack(), alone, strict=True):
        assert_same(one, expected)
