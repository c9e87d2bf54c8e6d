"""`check_compressor` passes every registered compressor, and finds what is wrong with wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import trio
from trio.core.tokens import Signal
from trio.encoders.compressors.average_pool import AveragePool
from trio.encoders.compressors.divprune import DivPrune
from trio.encoders.compressors.random import RandomTokens
from trio.encoders.compressors.uniform_grid import UniformGrid
from trio.encoders.compressors.visionzip import VisionZip
from trio.encoders.reading.merge import keep, merge
from trio.testing import check_compressor

OTHER_PARAMETERS = [
    {"name": "visionzip", "class_token": False},
    {"name": "visionzip", "contextual": 0},
    {"name": "visionzip", "contextual": 3, "combine": "mean"},
    {"name": "scan", "window": 4, "limit": "ceil", "local_layer": 0, "global_layer": -1},
    {"name": "scan", "merge": False, "local": 1.0, "window": 1},
    {"name": "prumerge", "plus": True},
    {"name": "prumerge", "rest": False, "share": 0.2, "neighbours": 3},
    {"name": "vispruner", "important": 0.0, "remove": 3},
    {"name": "random", "seed": 3},
]


@pytest.mark.parametrize("compressor", [*trio.COMPRESSORS.names(), *OTHER_PARAMETERS], ids=str)
def test_every_registered_compressor(compressor):
    assert check_compressor(compressor).passed


class OneMore(UniformGrid):
    def compress(self, tokens, k):
        return super().compress(tokens, min(k + 1, tokens.tokens))


class Unsorted(UniformGrid):
    def compress(self, tokens, k):
        out = super().compress(tokens, k)
        return out if k == tokens.tokens else keep(out, torch.arange(out.tokens).flip(0))


class Dice(UniformGrid):
    def compress(self, tokens, k):
        return keep(tokens, torch.randperm(tokens.tokens)[:k].sort().values)


class ForgetsSizes(AveragePool):
    def compress(self, tokens, k):
        return replace(super().compress(tokens, k), sizes=torch.ones(k))


class ForgetsTheMap(UniformGrid):
    def compress(self, tokens, k):
        return replace(super().compress(tokens, k), merge_map=tokens.merge_map)


class ForgetsSignals(DivPrune):
    def reads(self):
        return (Signal("hidden", -1),)

    def compress(self, tokens, k):
        return replace(super().compress(tokens, k), signals={})


class CallsMergedPatches(AveragePool):
    def compress(self, tokens, k):
        out = super().compress(tokens, k)
        origins = tokens.origins.select(torch.searchsorted(tokens.token_index, out.token_index))
        return replace(out, origins=replace(origins, size=out.origins.size))


class FullPrecision(AveragePool):
    def compress(self, tokens, k):
        return super().compress(replace(tokens, features=tokens.features.float()), k)


class Scribbler(UniformGrid):
    def compress(self, tokens, k):
        tokens.features.mul_(2)
        return super().compress(tokens, k)


class AlwaysAverages(AveragePool):
    """Averages twice, and once where nothing is to be done."""

    rewrites = True

    def compress(self, tokens, k):
        every = torch.arange(tokens.tokens)
        return merge(super().compress(tokens, k), torch.arange(k), torch.arange(k), tokens.features[every[:k]] * 0.5)


class Brightens(RandomTokens):
    """Changes tokens that nothing went into, and does not say so."""

    def compress(self, tokens, k):
        out = super().compress(tokens, k)
        return replace(out, features=out.features * 2)


class LastPlace(RandomTokens):
    """Counts places from the grid's top left of the image, as though no image had tiles."""

    def compress(self, tokens, k):
        return keep(tokens, (tokens.origins.row * 100 + tokens.origins.column)[:k])


class OnTheWay(RandomTokens):
    """Only half of what is asked for, without saying that it decides."""

    def compress(self, tokens, k):
        return super().compress(tokens, (k + 1) // 2)


class DecidesByItself(OnTheWay):
    decides_count = True


class ClassLast(VisionZip):
    def compress(self, tokens, k):
        out = super().compress(tokens, k)
        if int(out.token_index[0]) >= 0 or k < 3:
            return out
        return keep(out, torch.cat([torch.arange(1, k), torch.zeros(1, dtype=torch.int64)]))


WRONG = [
    (OneMore, "form, square grid", "2 tokens of 64, asked for 1"),
    (Unsorted, "form, square grid", "does not rise"),
    (Dice, "the same again", "called again"),
    (ForgetsSizes, "form, square grid", "has size 1.0, but"),
    (ForgetsTheMap, "form, square grid", "points beyond"),
    (ForgetsSignals, "form, square grid", "signals are not brought forward"),
    (CallsMergedPatches, "form, square grid", "is a 'patch', expected 'merged'"),
    (FullPrecision, "form, bfloat16", "torch.float32"),
    (Scribbler, "reads only", "features differ"),
    (AlwaysAverages, "as many as there are", "features changed"),
    (Brightens, "form, square grid", "other features than it started with"),
    (LastPlace, "form, a tile", "IndexError"),
    (OnTheWay, "form, square grid", "1 tokens of 64, asked for 2"),
    (ClassLast, "form, with the class token", "does not come first"),
]


@pytest.mark.parametrize(("compressor", "check", "says"), WRONG)
def test_wrong_compressors_are_found(compressor, check, says):
    results = check_compressor(compressor, raise_on_failure=False)
    assert any(check in failed.name and says in failed.detail for failed in results.failures), str(results)
    with pytest.raises(AssertionError, match=compressor.__name__):
        check_compressor(compressor())


def test_a_compressor_that_decides_the_number_itself():
    assert check_compressor(DecidesByItself).passed
