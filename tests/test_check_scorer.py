"""`check_scorer` passes every registered scorer, and finds what is wrong with wrong ones."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import trio
from trio.testing import TokenInputs, check_scorer, tiny_llava


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", trio.SCORERS.names())
def test_every_registered_scorer(name):
    results = check_scorer(name)
    assert results.passed and len(results) >= 10


def test_on_a_model_of_ones_own():
    results = check_scorer("random", model=tiny_llava(layers=3), inputs=TokenInputs())
    assert "bfloat16" not in {check.name for check in results}


class Norm(trio.Scorer):
    def score(self, ctx):
        return ctx.at_visual(ctx.hidden.float().norm(dim=-1))


class Half(Norm):
    def score(self, ctx):
        return super().score(ctx).to(torch.bfloat16)


class Zeros(trio.Scorer):
    def score(self, ctx):
        return torch.zeros(ctx.visual_index.shape)


class Dice(trio.Scorer):
    def score(self, ctx):
        return ctx.at_visual(torch.rand(ctx.visual.shape))


class Scribbler(Norm):
    def score(self, ctx):
        out = super().score(ctx)
        ctx.hidden.mul_(1.5)
        return out


class Relative(Norm):
    """Divides by the mean of the batch: other numbers alone."""

    def score(self, ctx):
        out = super().score(ctx)
        return out / out[ctx.visual_valid].mean()


class Transposed(Norm):
    def score(self, ctx):
        return super().score(ctx)[:, :-1]


class Broken(Norm):
    def score(self, ctx):
        return super().score(ctx) * float("nan")


class Columns(trio.Scorer):
    """Counts columns, padding included."""

    def score(self, ctx):
        return ctx.at_visual(torch.arange(ctx.hidden.shape[1]).expand(ctx.visual.shape).float())


class Fussy(Norm):
    """Raises where a sample has no image."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, ctx):
        if not all(sum(counts) for counts in ctx.counts):
            raise ValueError("no image")
        return super().score(ctx)


WRONG = [
    (Half, "shape, dtype", "bfloat16, expected float32"),
    (Zeros, "shape, dtype", "expected -inf"),
    (Dice, "called again", "called twice"),
    (Scribbler, "reads only", "ctx.hidden was changed"),
    (Relative, "samples alone", "differ"),
    (Transposed, "shape, dtype", "expected (4, 32)"),
    (Broken, "shape, dtype", "not finite"),
    (Columns, "other side", "differ"),
    (Fussy, "shape, dtype", "ValueError: no image"),
]


def test_a_sound_scorer_of_ones_own():
    assert check_scorer(Norm).passed


@pytest.mark.parametrize(("scorer", "check", "says"), WRONG)
def test_wrong_scorers_are_found(scorer, check, says):
    results = check_scorer(scorer, raise_on_failure=False)
    assert any(check in failed.name and says in failed.detail for failed in results.failures), str(results)
    with pytest.raises(AssertionError, match=scorer.__name__):
        check_scorer(scorer())
