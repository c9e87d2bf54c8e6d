"""`check_selector` passes every registered selector, and finds what is wrong with wrong ones."""

from __future__ import annotations

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
    def select(self, saliency, features, k, valid, places):
        indices, there = super().select(saliency, features, k, valid, places)
        return indices.flip(1), there.flip(1)


class OneMore(TopK):
    def select(self, saliency, features, k, valid, places):
        return super().select(saliency, features, (k + 1).clamp_max(saliency.shape[1]), valid, places)


class Padded(TopK):
    """Takes the last columns, padding or not."""

    def select(self, saliency, features, k, valid, places):
        return super().select(
            torch.arange(saliency.shape[1]).expand(saliency.shape).float(), features, k, valid | True, places
        )


class Floating(TopK):
    def select(self, saliency, features, k, valid, places):
        indices, there = super().select(saliency, features, k, valid, places)
        return indices.int(), there


class Dice(TopK):
    def select(self, saliency, features, k, valid, places):
        return super().select(torch.rand(saliency.shape), features, k, valid, places)


class WholeBatch(TopK):
    """Centres the features of all groups together, padding included."""

    def select(self, saliency, features, k, valid, places):
        away = (features.float() - features.float().mean((0, 1))).norm(dim=-1)
        return super().select(away.masked_fill(~valid, float("-inf")), features, k, valid, places)


class Scribbler(TopK):
    def select(self, saliency, features, k, valid, places):
        out = super().select(saliency, features, k, valid, places)
        features += 1
        return out


class AtLeastOne(TopK):
    def select(self, saliency, features, k, valid, places):
        return super().select(saliency, features, k.clamp_min(1), valid, places)


class Undecided(TopK):
    """Fewer than asked for, without saying that it decides the number."""

    def select(self, saliency, features, k, valid, places):
        return super().select(saliency, features, k // 2, valid, places)


class Decided(Undecided):
    decides_count = True


WRONG = [
    (Unsorted, "form, random", "first ones"),
    (OneMore, "form, random", "chose 10 tokens, asked for 9"),
    (Padded, "form, random", "padding"),
    (Floating, "form, random", "int32"),
    (Dice, "form, random", "called twice"),
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
