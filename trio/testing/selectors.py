"""`check_selector`: what every selector must do, on tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import torch

from ..core.context import SelectionContext, TokenOrigins
from ..core.tokens import PATCH
from ..selectors.base import SELECTORS, Selector
from .results import Case, CheckResults, require, run_cases


def check_selector(selector: Selector | type[Selector] | str, *, raise_on_failure: bool = True) -> CheckResults:
    """Checks a selector: counts, order, determinism, batches, and features of every degenerate kind.

    Args:
        selector: an object, a class or a registered name.
        raise_on_failure: whether to raise where a check does not hold.

    Returns:
        Every check with its numbers.

    Raises:
        AssertionError: a check does not hold.
    """
    part: Selector = SELECTORS.build(selector)
    results = CheckResults(f"selector {part!r}", tuple(run_cases("selector", _Suite(part).cases())))
    return results.raise_if_failed() if raise_on_failure else results


#: Tokens and counts of the groups: all, none, some, one of one, and more tokens than a block of 64.
SIZES = ((9, 9), (16, 0), (16, 5), (1, 1), (3, 2), (130, 70))


def _random(seed: int, *, dtype: torch.dtype = torch.float32, kind: str = "random") -> SelectionContext:
    """Ragged groups of two images each."""
    generator = torch.Generator().manual_seed(seed)
    most, width = max(n for n, _ in SIZES), 8
    shape = (len(SIZES), most, width)
    features = torch.randn(shape, generator=generator)
    saliency = torch.rand(shape[:2], generator=generator)
    if kind == "equal features":
        features = torch.ones(shape)
    elif kind == "zero features":
        features = torch.zeros(shape)
    elif kind == "ties":
        saliency = torch.ones(shape[:2])
    elif kind == "few levels":
        saliency = (saliency * 3).round()
        features = features.sign()
    counts = tuple(n for n, _ in SIZES)
    valid = torch.arange(most)[None] < torch.tensor(counts)[:, None]
    row, column, image = torch.rand((*shape[:2], 3), generator=generator).unbind(-1)
    if kind == "one position":
        row = column = torch.full_like(row, 0.5)
    elif kind == "unknown positions":
        row = column = torch.full_like(row, float("nan"))
    zero = torch.zeros_like(valid, dtype=torch.int64)
    return SelectionContext(
        saliency=saliency.masked_fill(~valid, float("-inf")),
        features=features.to(dtype),
        k=torch.tensor([k for _, k in SIZES]),
        valid=valid,
        counts=counts,
        origins=TokenOrigins(row, column, (image * 2).long(), zero, zero + PATCH),
        sizes=torch.randint(1, 5, shape[:2], generator=generator).float(),
        seeds=tuple(seed * 1000 + group for group in range(len(SIZES))),
    )


def _take(ctx: SelectionContext, groups: list[int], tokens: int | None = None) -> SelectionContext:
    """Some of the groups, cut to their first tokens."""

    def cut(values: torch.Tensor) -> torch.Tensor:
        return values[groups][:, :tokens]

    return SelectionContext(
        saliency=cut(ctx.saliency),
        features=cut(ctx.features),
        k=ctx.k[groups],
        valid=cut(ctx.valid),
        counts=tuple(ctx.counts[group] for group in groups),
        origins=ctx.origins.map(cut),
        sizes=cut(ctx.sizes),
        seeds=tuple(ctx.seeds[group] for group in groups),
    )


def _alone(ctx: SelectionContext, group: int) -> SelectionContext:
    """One group without its padding."""
    return _take(ctx, [group], ctx.counts[group])


def _tensors(ctx: SelectionContext) -> dict[str, torch.Tensor]:
    """The tensors of a context by name."""
    return {
        f.name: value
        for part in (ctx, ctx.origins)
        for f in fields(part)
        if isinstance(value := getattr(part, f.name), torch.Tensor)
    }


KINDS = ("random", "equal features", "zero features", "ties", "few levels", "one position", "unknown positions")


class _Suite:
    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def cases(self) -> Iterator[Case]:
        yield "parameters round trip", self._parameters
        for kind in KINDS:
            yield f"form, {kind}", partial(self._form, kind)
        for kind in KINDS:
            yield f"a batch chooses as its groups alone, {kind}", partial(self._alone, kind)
        yield "the order of the batch does not matter", self._permuted
        yield "what stands at padding does not matter", self._padding
        yield "nothing asked for, nothing there", self._empty
        yield "reads only", self._reads_only
        yield "bfloat16 features", self._half
        yield "torch.no_grad and torch.inference_mode", self._modes

    def _select(self, ctx: SelectionContext) -> list[list[int]]:
        """The chosen tokens of each group, checked for form."""
        out = self.selector.select(ctx)
        require(isinstance(out, tuple) and len(out) == 2, f"found {type(out).__name__}, expected indices and valid")
        indices, valid = out
        require(indices.dtype == torch.int64, f"indices are {indices.dtype}, expected int64")
        require(valid.dtype == torch.bool, f"valid is {valid.dtype}, expected bool")
        require(indices.shape == valid.shape, f"shapes {tuple(indices.shape)} and {tuple(valid.shape)} differ")
        require(indices.shape[0] == len(ctx.k), f"{indices.shape[0]} rows for {len(ctx.k)} groups")
        chosen = []
        for group, (row, flags) in enumerate(zip(indices.tolist(), valid.tolist(), strict=True)):
            k, count = int(ctx.k[group]), sum(flags)
            fits = count <= k if self.selector.decides_count else count == k
            require(fits, f"group {group}: chose {count} tokens, asked for {k}")
            require(all(flags[:count]), f"group {group}: valid must be True at the first ones, found {flags}")
            kept = row[:count]
            tokens = ctx.counts[group]
            require(all(a < b for a, b in pairwise(kept)), f"group {group}: {kept} do not rise")
            real = all(0 <= index < ctx.valid.shape[1] and bool(ctx.valid[group, index]) for index in kept)
            require(real, f"group {group}: chose {kept} of {tokens} tokens: some are padding")
            chosen.append(kept)
        return chosen

    def _parameters(self) -> str:
        again = type(self.selector)(**self.selector.model_dump())
        require(again == self.selector, f"made again from its own parameters, it is {again!r}")
        from_json = type(self.selector).model_validate_json(self.selector.model_dump_json())
        require(from_json == self.selector, f"made again from JSON, it is {from_json!r}")
        return f"{len(type(self.selector).model_fields)} parameters"

    def _form(self, kind: str) -> str:
        ctx = _random(0, kind=kind)
        chosen = self._select(ctx)
        require(chosen == self._select(ctx), "called twice, it chose other tokens")
        torch.manual_seed(1)
        require(chosen == self._select(ctx), "another global seed, other tokens")
        return f"chose {[len(kept) for kept in chosen]} of {[n for n, _ in SIZES]}"

    def _alone(self, kind: str) -> str:
        for seed in range(5):
            ctx = _random(seed, kind=kind)
            together = self._select(ctx)
            for group in range(len(SIZES)):
                (alone,) = self._select(_alone(ctx, group))
                require(together[group] == alone, f"group {group}: in a batch {together[group]}, alone {alone}")
        return f"{5 * len(SIZES)} groups"

    def _permuted(self) -> str:
        ctx = _random(3)
        order = list(range(len(SIZES)))[::-1]
        here, back = self._select(ctx), self._select(_take(ctx, order))
        require(here == back[::-1], "the same groups in another order gave other tokens")
        return "the same tokens"

    def _padding(self) -> str:
        ctx = _random(4)
        expected = self._select(ctx)
        for filling in (0.0, 1e6, float("inf"), float("nan")):
            filled = {
                "features": replace(ctx, features=ctx.features.masked_fill(~ctx.valid[..., None], filling)),
                "positions": replace(
                    ctx,
                    origins=replace(
                        ctx.origins,
                        row=ctx.origins.row.masked_fill(~ctx.valid, filling),
                        column=ctx.origins.column.masked_fill(~ctx.valid, filling),
                    ),
                ),
                "sizes": replace(ctx, sizes=ctx.sizes.masked_fill(~ctx.valid, filling)),
            }
            for name, other in filled.items():
                require(self._select(other) == expected, f"{name} {filling} at padding changed the choice")
        return "the same tokens for 0, 1e6, inf and nan"

    def _empty(self) -> str:
        ctx = _random(5)
        nothing = replace(ctx, k=torch.zeros_like(ctx.k))
        require(not any(self._select(nothing)), "tokens were chosen where none was asked for")
        none = _take(ctx, [])
        require(self._select(none) == [], "no group must give no row")
        return "k = 0, no groups"

    def _reads_only(self) -> str:
        ctx = _random(6)
        before = {name: tensor.clone() for name, tensor in _tensors(ctx).items()}
        self._select(ctx)
        for name, tensor in _tensors(ctx).items():
            require(torch.equal(tensor, before[name]), f"{name} was changed")
        return "nothing was changed"

    def _half(self) -> str:
        ctx = _random(7, dtype=torch.bfloat16)
        chosen = self._select(ctx)
        alone = [self._select(_alone(ctx, group))[0] for group in range(len(SIZES))]
        require(chosen == alone, "in a batch other tokens than alone")
        return f"chose {[len(kept) for kept in chosen]}"

    def _modes(self) -> str:
        ctx = _random(8)
        expected = self._select(ctx)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                made = _random(8)
                require(self._select(made) == expected, f"other tokens under torch.{mode.__name__}")
        return "the same tokens"
