"""`check_selector` passes every registered selector, and finds what is wrong with wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import trio
from trio.selectors.top_k import TopK
from trio.testing import check_selector


@pytest.mark.parametrize(
    "selector", [*trio.SELECTORS.names(), *({"name": "nms", "threshold": t} for t in (-1.0, 0.3, 1.01))], ids=str
)
def test_every_registered_selector(selector):
    assert check_selector(selector).passed


class Unsorted(TopK):
    def select(self, ctx):
        indices, there = super().select(ctx)
        return indices.flip(1), there.flip(1)


class OneMore(TopK):
    def select(self, ctx):
        return super().select(replace(ctx, k=(ctx.k + 1).clamp_max(ctx.saliency.shape[1])))


class Padded(TopK):
    """Takes the last columns, padding or not."""

    def select(self, ctx):
        last = torch.arange(ctx.saliency.shape[1]).expand(ctx.saliency.shape).float()
        return super().select(replace(ctx, saliency=last, valid=ctx.valid | True))


class Floating(TopK):
    def select(self, ctx):
        indices, there = super().select(ctx)
        return indices.int(), there


class Dice(TopK):
    def select(self, ctx):
        return super().select(replace(ctx, saliency=torch.rand(ctx.saliency.shape)))


class WholeBatch(TopK):
    """Centres the features of all groups together, padding included."""

    def select(self, ctx):
        away = (ctx.features.float() - ctx.features.float().mean((0, 1))).norm(dim=-1)
        return super().select(replace(ctx, saliency=away.masked_fill(~ctx.valid, float("-inf"))))


class Scribbler(TopK):
    def select(self, ctx):
        out = super().select(ctx)
        ctx.features.add_(1)
        return out


class AtLeastOne(TopK):
    def select(self, ctx):
        return super().select(replace(ctx, k=ctx.k.clamp_min(1)))


class Undecided(TopK):
    """Fewer than asked for, without saying that it decides the number."""

    def select(self, ctx):
        return super().select(replace(ctx, k=ctx.k // 2))


class Decided(Undecided):
    decides_count = True


class ByGroupNumber(TopK):
    """Draws for the number of a group in its batch, where its own generator would do."""

    def select(self, ctx):
        draws = [torch.rand(ctx.valid.shape[1], generator=torch.Generator().manual_seed(g)) for g in range(len(ctx.k))]
        draws = torch.stack(draws) if draws else ctx.saliency
        return super().select(replace(ctx, saliency=draws.masked_fill(~ctx.valid, float("-inf"))))


WRONG = [
    (Unsorted, "form, random", "first ones"),
    (OneMore, "form, random", "chose 10 tokens, asked for 9"),
    (Padded, "form, random", "padding"),
    (Floating, "form, random", "int32"),
    (Dice, "form, random", "called twice"),
    (ByGroupNumber, "groups alone, random", "alone"),
    (WholeBatch, "groups alone, random", "alone"),
    (WholeBatch, "padding", "changed the choice"),
    (Scribbler, "reads only", "features was changed"),
    (AtLeastOne, "nothing asked for", "asked for 0"),
    (Undecided, "form, random", "chose 4 tokens, asked for 9"),
]


@pytest.mark.parametrize(("selector", "check", "says"), WRONG)
def test_wrong_selectors_are_found(selector, check, says):
    results = check_selector(selector, raise_on_failure=False)
    assert any(check in failed.name and says in failed.detail for failed in results.failures), str(results)
    with pytest.raises(AssertionError, match=selector.__name__):
        check_selector(selector())


def test_a_selector_that_decides_the_number_itself():
    assert check_selector(Decided).passed


class OwnDraws(TopK):
    """Random tokens, of each group's own generator."""

    def select(self, ctx):
        return super().select(replace(ctx, saliency=ctx.random().masked_fill(~ctx.valid, float("-inf"))))


def test_a_selector_that_draws_from_the_generators_of_the_groups():
    assert check_selector(OwnDraws).passed
