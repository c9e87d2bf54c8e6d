"""`check_compressor`: what every compressor must do, on tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from ..core.tokens import CLS, KINDS, MERGED, PATCH, ImageTokens, Signal, VisualTokens
from ..encoders.compressors.base import COMPRESSORS, Compressor
from .results import Case, CheckResults, require, run_cases


def check_compressor(compressor: Compressor | type[Compressor] | str, *, raise_on_failure: bool = True) -> CheckResults:
    """Checks a compressor: counts, order, the record of what went where, determinism, precision, two in a row.

    It gets random features and the signals that it declares, on square, ragged and one-row grids and on a tile.

    Args:
        compressor: an object, a class or a registered name.
        raise_on_failure: whether to raise where a check does not hold.

    Returns:
        Every check with its numbers.

    Raises:
        AssertionError: a check does not hold.
    """
    part: Compressor = COMPRESSORS.build(compressor)
    results = CheckResults(f"compressor {part!r}", tuple(run_cases("compressor", _Suite(part).cases())))
    return results.raise_if_failed() if raise_on_failure else results


#: Rows and columns, and the row and the column at which the grid begins (a tile's are those of the whole image).
GRIDS = {
    "square grid": (8, 8, 0, 0),
    "ragged grid": (5, 13, 0, 0),
    "one row": (1, 9, 0, 0),
    "one column": (7, 1, 0, 0),
    "one token": (1, 1, 0, 0),
    "a tile": (6, 6, 12, 6),
}
KINDS_OF_FEATURES = ("random", "equal features", "zero features", "ties")
WIDTH, HEADS, HEAD_DIM = 16, 4, 8


def _tokens(
    reads: tuple[Signal, ...],
    grid: str = "square grid",
    *,
    seed: int = 0,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
    class_token: bool = False,
) -> VisualTokens:
    """One input's tokens with the signals asked for; attention sums to less than 1, the class token has the rest."""
    rows, columns, top, left = GRIDS[grid]
    n = rows * columns
    generator = torch.Generator().manual_seed(seed)
    origins = ImageTokens.from_grid(rows, columns)
    whole = ((top + rows, left + columns),)
    origins = replace(origins, row=origins.row + top, column=origins.column + left, grids=whole)
    features = torch.randn(n, WIDTH, generator=generator)
    signals = {}
    for one in reads:
        attention = torch.randn(n + 1, generator=generator).mul(2).softmax(0)[1:]
        values = {
            "attention": torch.full((n,), 1 / (n + 1)) if kind == "ties" else attention,
            "keys": torch.randn(n, HEADS, HEAD_DIM, generator=generator),
            "hidden": torch.randn(n, WIDTH, generator=generator).to(dtype),
            "cls": torch.randn(WIDTH, generator=generator).to(dtype),
            "groups": torch.arange(n) // 3 * 3,
        }
        signals[one] = values[one.kind]
    if kind == "equal features":
        features = torch.ones_like(features)
    elif kind == "zero features":
        features = torch.zeros_like(features)
    cls = torch.randn(WIDTH, generator=generator).to(dtype) if class_token else None
    return VisualTokens.start(features.to(dtype), origins, signals, class_token=cls, seed=seed)


def _counts(n: int) -> list[int]:
    return sorted({1, min(2, n), max(1, n // 3), max(1, n - 1), n})


class _Suite:
    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.reads = compressor.reads()

    def cases(self) -> Iterator[Case]:
        yield "parameters round trip", self._parameters
        yield "what it reads", self._declares
        for grid in GRIDS:
            yield f"form, {grid}", partial(self._form, grid)
        for kind in KINDS_OF_FEATURES[1:]:
            yield f"form, {kind}", partial(self._form, "ragged grid", kind)
        if self.compressor.wants_cls:
            yield "form, with the class token", partial(self._form, "ragged grid", class_token=True)
        if not self.compressor.decides_count:
            yield "as many as there are: nothing changes", self._identity
        yield "the same again", self._deterministic
        yield "twice in a row", self._composed
        yield "reads only", self._reads_only
        for dtype in (torch.bfloat16, torch.float16):
            yield f"form, {str(dtype).removeprefix('torch.')}", partial(self._form, "ragged grid", dtype=dtype)
        yield "torch.no_grad and torch.inference_mode", self._modes

    def _compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """What the compressor gives, checked for form."""
        count = tokens.tokens if self.compressor.decides_count else k
        out = self.compressor.compress(tokens, count)
        require(isinstance(out, VisualTokens), f"found {type(out).__name__}, expected VisualTokens")
        m = out.tokens
        fits = 1 <= m <= tokens.tokens if self.compressor.decides_count else m == count
        require(fits, f"{m} tokens of {tokens.tokens}, asked for {count}")
        self._shapes(tokens, out)
        self._order(out)
        self._record(tokens, out)
        require(bool(out.features.isfinite().all()), "features are not finite")
        return out

    def _shapes(self, tokens: VisualTokens, out: VisualTokens) -> None:
        m, n = out.tokens, tokens.tokens
        expected = {
            "features": (out.features, (m, tokens.features.shape[1]), tokens.features.dtype),
            "sizes": (out.sizes, (m,), torch.float32),
            "token_index": (out.token_index, (m,), torch.int64),
            "merge_map": (out.merge_map, tuple(tokens.merge_map.shape), torch.int64),
        }
        for name, (tensor, shape, dtype) in expected.items():
            facts = f"{name} are {tensor.dtype} {tuple(tensor.shape)}"
            require(tuple(tensor.shape) == shape and tensor.dtype == dtype, f"{facts}, expected {dtype} {shape}")
            same = tensor.device == tokens.features.device
            require(same, f"{name} are on {tensor.device}, expected {tokens.features.device}")
        require(out.origins.tokens == m, f"{out.origins.tokens} origins for {m} tokens")
        require(
            out.signals.keys() == tokens.signals.keys(),
            "the signals are not brought forward: see trio.encoders.reading.merge",
        )
        for signal, value in out.signals.items():
            rows = tokens.signals[signal].shape[0] if signal.kind == "cls" else m
            require(value.shape[0] == rows, f"{signal}: {value.shape[0]} rows for {m} of {n} tokens")

    def _order(self, out: VisualTokens) -> None:
        index = out.token_index.tolist()
        patches = [one for one in index if one >= 0]
        require(len(patches) == len(index) or index.index(-1) == 0, f"the class token does not come first: {index}")
        require(len(patches) >= len(index) - 1, f"more than one class token: {index}")
        require(all(a < b for a, b in pairwise(patches)), f"token_index {patches} does not rise: not in raster order")
        require(all(one < len(out.merge_map) for one in patches), f"token_index {patches}: {len(out.merge_map)} tokens")

    def _record(self, tokens: VisualTokens, out: VisualTokens) -> None:
        """Sizes, token_index and origins against the merge map."""
        merged = out.merge_map.tolist()
        require(
            all(-1 <= to < out.tokens for to in merged), f"the merge map {merged} points beyond {out.tokens} tokens"
        )
        started = tokens.merge_map.tolist()
        back = [place for place, to in enumerate(merged) if to >= 0 and started[place] < 0]
        require(not back, f"{back} were dropped before and are in the merge map again")
        kinds = [KINDS[kind] for kind in out.origins.kind.tolist()]
        first = {place: at for at, place in enumerate(tokens.token_index.tolist())}
        for at, place in enumerate(out.token_index.tolist()):
            members = [start for start, to in enumerate(merged) if to == at]
            name = f"token {at}"
            if place < 0:
                require(kinds[at] == KINDS[CLS], f"{name} has no place, but is a {kinds[at]!r}")
                require(not members, f"{name}, the class token, has {members} of the merge map")
                continue
            require(place in members, f"{name} stands at {place}, which went into {merged[place]}")
            require(
                float(out.sizes[at]) == len(members), f"{name} has size {float(out.sizes[at])}, but {members} in it"
            )
            kind = KINDS[MERGED if len(members) > 1 else PATCH]
            require(kinds[at] == kind, f"{name} holds {len(members)} tokens and is a {kinds[at]!r}, expected {kind!r}")
            size = int(out.origins.size[at])
            require(size == len(members), f"{name}: its origin has size {size}, expected {len(members)}")
            was = first.get(place)
            require(was is not None, f"{name} stands at {place}, where no token stood")
            same = torch.equal(out.features[at], tokens.features[was or 0])
            require(
                kind != KINDS[PATCH] or same or self.compressor.rewrites,
                f"{name} is a {kind!r} and has other features than it started with; a pipeline would not write them: "
                "set `rewrites = True` on the compressor",
            )
            for axis in ("frame", "row", "column"):
                here, there = (int(getattr(o, axis)[i]) for o, i in ((out.origins, at), (tokens.origins, was or 0)))
                require(here == there, f"{name}: its {axis} is {here}, that of its place is {there}")

    def _parameters(self) -> str:
        again = type(self.compressor)(**self.compressor.model_dump())
        require(again == self.compressor, f"made again from its own parameters, it is {again!r}")
        from_json = type(self.compressor).model_validate_json(self.compressor.model_dump_json())
        require(from_json == self.compressor, f"made again from JSON, it is {from_json!r}")
        return f"{len(type(self.compressor).model_fields)} parameters"

    def _declares(self) -> str:
        require(isinstance(self.reads, tuple), f"reads() gave a {type(self.reads).__name__}, expected a tuple")
        wrong = [one for one in self.reads if not isinstance(one, Signal)]
        require(not wrong, f"reads() gave {wrong}, expected Signal")
        require(self.reads == self.compressor.reads(), "called twice, reads() gave other signals")
        require(self.compressor.space in ("tower", "language"), f"space is {self.compressor.space!r}")
        return ", ".join(f"{one.kind} of block {one.layer}" for one in self.reads) or "nothing"

    def _form(
        self, grid: str, kind: str = "random", *, dtype: torch.dtype = torch.float32, class_token: bool = False
    ) -> str:
        counts = []
        for seed in range(3):
            tokens = _tokens(self.reads, grid, seed=seed, kind=kind, dtype=dtype, class_token=class_token)
            counts += [self._compress(tokens, k).tokens for k in _counts(tokens.tokens)]
        return f"{counts} of {tokens.tokens}"

    def _identity(self) -> str:
        for grid in GRIDS:
            for class_token in {False, self.compressor.wants_cls}:
                tokens = _tokens(self.reads, grid, class_token=class_token)
                out = self._compress(tokens, tokens.tokens)
                for name in ("features", "sizes", "token_index", "merge_map"):
                    require(torch.equal(getattr(out, name), getattr(tokens, name)), f"{grid}: {name} changed")
        return f"{len(GRIDS)} grids, bit by bit"

    def _deterministic(self) -> str:
        tokens = _tokens(self.reads)
        expected = self._compress(tokens, 20)
        for seed in (0, 1):
            torch.manual_seed(seed)
            _require_same(self._compress(tokens, 20), expected, f"called again (global seed {seed})")
        return f"{expected.tokens} tokens, bit by bit"

    def _composed(self) -> str:
        counts = []
        for class_token in {False, self.compressor.wants_cls}:
            tokens = _tokens(self.reads, "ragged grid", class_token=class_token)
            for k in (40, 12, 5, 1):
                tokens = self._compress(tokens, min(k, tokens.tokens))
                counts.append(tokens.tokens)
        return f"left {counts}"

    def _reads_only(self) -> str:
        tokens = _tokens(self.reads, class_token=self.compressor.wants_cls)
        again = _tokens(self.reads, class_token=self.compressor.wants_cls)
        self._compress(tokens, 20)
        _require_same(tokens, again, "after the call what it was given")
        for signal, value in tokens.signals.items():
            require(torch.equal(value, again.signals[signal]), f"it changed {signal}")
        return "nothing was changed"

    def _modes(self) -> str:
        expected = self._compress(_tokens(self.reads), 20)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                _require_same(self._compress(_tokens(self.reads), 20), expected, f"under torch.{mode.__name__}")
        return "the same tokens"


def _require_same(actual: VisualTokens, expected: VisualTokens, when: str) -> None:
    for name in ("features", "sizes", "token_index", "merge_map"):
        require(torch.equal(getattr(actual, name), getattr(expected, name)), f"{when}: {name} differ")
