"""What a stage costs beside scoring and selecting: launches, and what is computed only when somebody reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.models import inputs, llava
from torch.utils._python_dispatch import TorchDispatchMode

import trio
from trio.core.context import DeferredOrigins, LayerContext, SelectionContext, TokenOrigins
from trio.runtime import forward as running


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Norms(trio.Scorer):
    """Lengths of the hidden states, in two launches and those of `at_visual`."""

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return ctx.at_visual(ctx.hidden.float().norm(dim=-1))


@dataclass(frozen=True)
class First(trio.Selector):
    """The first k tokens."""

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        most = max(ctx.k.tolist())
        index = torch.arange(most, device=ctx.valid.device).expand(len(ctx.k), -1)
        return index, index < ctx.k.to(ctx.valid.device)[:, None]


@dataclass(frozen=True)
class Reading(First):
    """The same, and reads tiles and rows."""

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        SEEN.append((ctx.origins.tile, ctx.origins.row))
        return super().select(ctx)


SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []


def launches(stages: list[trio.Stage], positions: Any) -> int:
    model, batch = llava(layers=6), inputs([[5, "image", 6, 7, 8]])
    with trio.Pipeline(model, stages=stages, positions=positions), torch.no_grad(), Launches() as count:
        model(**batch)
    return count.count


@pytest.mark.parametrize(("positions", "most"), [("original", 33), ("compact", 45)])
def test_a_stage_costs_few_launches_beside_its_parts(positions, most):
    """The difference that a further stage makes, the selector's and the scorer's own operators included."""
    one, two = (
        [trio.Stage(after_layer=layer, keep=keep, scorer=Norms(), selector=First()) for layer, keep in stages]
        for stages in ([(2, 8)], [(2, 8), (4, 4)])
    )
    assert launches(two, positions) - launches(one, positions) <= most


def test_origins_are_computed_for_a_selector_that_reads_them_and_for_no_other(monkeypatch):
    computed = []
    origins_of = running.origins_of
    monkeypatch.setattr(running, "origins_of", lambda images: computed.append(1) or origins_of(images))
    model, batch = llava(layers=6), inputs([[5, "image", 6, 7], [8, "image", "image", 9]])
    for selector, expected in ((First(), 0), (Reading(), 1)):
        SEEN.clear()
        stages = [
            trio.Stage(after_layer=n, keep=keep, scorer=Norms(), selector=selector) for n, keep in ((2, 4), (4, 2))
        ]
        with trio.Pipeline(model, stages=stages), torch.no_grad():
            model(**batch)
        assert len(computed) == expected
    # Three images of 16 tokens in four rows, of which the first four are left at the second stage.
    assert SEEN[0][1].tolist() == [[row / 4 + 1 / 8 for row in range(4) for _ in range(4)]] * 3
    assert SEEN[1][1].tolist() == [[1 / 8] * 4] * 3
    assert SEEN[1][0].tolist() == [[0.0] * 4] * 3


def test_deferred_origins_are_computed_once_with_their_tiles():
    calls = []

    def compute() -> TokenOrigins:
        calls.append(1)
        known = TokenOrigins.unknown(torch.zeros(2, 3))
        return TokenOrigins(known.row, known.column, known.image, known.frame, known.kind, lambda: torch.ones(2, 3))

    for first in ("tile", "row", "kind", "map"):
        calls.clear()
        deferred = DeferredOrigins(compute)
        assert not calls
        if first == "map":
            assert deferred.map(lambda values: values + 1).tile.eq(2).all()
        else:
            getattr(deferred, first)
        assert deferred.tile.eq(1).all() and deferred.image.eq(0).all()
        assert len(calls) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_saliency_that_is_not_finite_is_found_in_a_ragged_batch(bad):
    @dataclass(frozen=True)
    class Broken(trio.Scorer):
        def score(self, ctx: LayerContext) -> torch.Tensor:
            values = ctx.at_visual(ctx.hidden.float().norm(dim=-1))
            values[1, 5] = bad
            return values

    model, batch = llava(layers=6), inputs([[5, "image", 6, 7], [8, "image", "image", 9]])
    stages = [trio.Stage(after_layer=2, keep=4, scorer=Broken())]
    with trio.Pipeline(model, stages=stages), torch.no_grad(), pytest.raises(trio.TrioError, match="not finite"):
        model(**batch)
