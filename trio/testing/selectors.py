"""`check_selector`: what every selector must do, on tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise

import torch

from ..selectors.base import SELECTORS, Selector
from .results import Case, Results, require, run_cases


def check_selector(selector: Selector | type[Selector] | str, *, raise_on_failure: bool = True) -> Results:
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
    results = Results(f"selector {part!r}", tuple(run_cases("selector", _Suite(part).cases())))
    return results.raise_if_failed() if raise_on_failure else results


@dataclass(frozen=True)
class _Groups:
    """What `Selector.select` takes, as ragged groups."""

    saliency: torch.Tensor
    features: torch.Tensor
    k: torch.Tensor
    valid: torch.Tensor
    places: torch.Tensor

    def take(self, groups: list[int]) -> _Groups:
        return _Groups(*(tensor[groups] for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, in the order of `Selector.select`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def alone(self, group: int) -> _Groups:
        """One group without its padding."""
        n = int(self.valid[group].sum())
        one = self.take([group])
        return _Groups(one.saliency[:, :n], one.features[:, :n], one.k, one.valid[:, :n], one.places[:, :n])


#: Tokens and counts of the groups: all, none, some, one of one, and more tokens than a block of 64.
SIZES = ((9, 9), (16, 0), (16, 5), (1, 1), (3, 2), (130, 70))


def _random(seed: int, *, dtype: torch.dtype = torch.float32, kind: str = "random") -> _Groups:
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
    valid = torch.arange(most)[None] < torch.tensor([n for n, _ in SIZES])[:, None]
    k = torch.tensor([k for _, k in SIZES])
    places = torch.rand((*shape[:2], 3), generator=generator)
    places[..., 2] = (places[..., 2] * 2).floor()  # of two pictures
    if kind == "one place":
        places = torch.full_like(places, 0.5)
    elif kind == "unknown places":
        places[..., :2] = float("nan")
    return _Groups(saliency.masked_fill(~valid, float("-inf")), features.to(dtype), k, valid, places)


KINDS = ("random", "equal features", "zero features", "ties", "few levels", "one place", "unknown places")


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

    def _select(self, groups: _Groups) -> list[list[int]]:
        """The chosen tokens of each group, checked for form."""
        out = self.selector.select(*groups.tensors().values())
        require(isinstance(out, tuple) and len(out) == 2, f"found {type(out).__name__}, expected indices and valid")
        indices, there = out
        require(indices.dtype == torch.int64, f"indices are {indices.dtype}, expected int64")
        require(there.dtype == torch.bool, f"valid is {there.dtype}, expected bool")
        require(indices.shape == there.shape, f"shapes {tuple(indices.shape)} and {tuple(there.shape)} differ")
        require(indices.shape[0] == len(groups.k), f"{indices.shape[0]} rows for {len(groups.k)} groups")
        chosen = []
        for group, (row, flags) in enumerate(zip(indices.tolist(), there.tolist(), strict=True)):
            k, count = int(groups.k[group]), sum(flags)
            fits = count <= k if self.selector.decides_count else count == k
            require(fits, f"group {group}: chose {count} tokens, asked for {k}")
            require(all(flags[:count]), f"group {group}: valid must be True at the first ones, found {flags}")
            kept = row[:count]
            tokens = int(groups.valid[group].sum())
            require(all(a < b for a, b in pairwise(kept)), f"group {group}: {kept} do not rise")
            real = all(0 <= index < groups.valid.shape[1] and bool(groups.valid[group, index]) for index in kept)
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
        groups = _random(0, kind=kind)
        chosen = self._select(groups)
        require(chosen == self._select(groups), "called twice, it chose other tokens")
        torch.manual_seed(1)
        require(chosen == self._select(groups), "another global seed, other tokens")
        return f"chose {[len(kept) for kept in chosen]} of {[n for n, _ in SIZES]}"

    def _alone(self, kind: str) -> str:
        for seed in range(5):
            groups = _random(seed, kind=kind)
            together = self._select(groups)
            for group in range(len(SIZES)):
                (alone,) = self._select(groups.alone(group))
                require(together[group] == alone, f"group {group}: in a batch {together[group]}, alone {alone}")
        return f"{5 * len(SIZES)} groups"

    def _permuted(self) -> str:
        groups = _random(3)
        order = list(range(len(SIZES)))[::-1]
        there, back = self._select(groups), self._select(groups.take(order))
        require(there == back[::-1], "the same groups in another order gave other tokens")
        return "the same tokens"

    def _padding(self) -> str:
        groups = _random(4)
        expected = self._select(groups)
        for filling in (0.0, 1e6, float("inf"), float("nan")):
            for name in ("features", "places"):
                filled = groups.tensors()[name].masked_fill(~groups.valid[..., None], filling)
                found = self._select(replace(groups, **{name: filled}))
                require(found == expected, f"{name} {filling} at padding changed the choice")
        return "the same tokens for 0, 1e6, inf and nan"

    def _empty(self) -> str:
        groups = _random(5)
        nothing = replace(groups, k=torch.zeros_like(groups.k))
        require(not any(self._select(nothing)), "tokens were chosen where none was asked for")
        none = groups.take([])
        require(self._select(none) == [], "no group must give no row")
        return "k = 0, no groups"

    def _reads_only(self) -> str:
        groups = _random(6)
        before = {name: tensor.clone() for name, tensor in groups.tensors().items()}
        self._select(groups)
        for name, tensor in groups.tensors().items():
            require(torch.equal(tensor, before[name]), f"{name} was changed")
        return "nothing was changed"

    def _half(self) -> str:
        groups = _random(7, dtype=torch.bfloat16)
        chosen = self._select(groups)
        alone = [self._select(groups.alone(group))[0] for group in range(len(SIZES))]
        require(chosen == alone, "in a batch other tokens than alone")
        return f"chose {[len(kept) for kept in chosen]}"

    def _modes(self) -> str:
        groups = _random(8)
        expected = self._select(groups)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                made = _random(8)
                require(self._select(made) == expected, f"other tokens under torch.{mode.__name__}")
        return "the same tokens"
