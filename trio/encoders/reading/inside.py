"""Merging tokens between the blocks of a running tower, by hooks: Token Merging (arXiv 2210.09461) on stock modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import InputError
from ..towers.base import Heads, Tower, hidden_of
from .matching import Matching, match, rows


@dataclass
class _Tokens:
    """The tokens of a running call: S rows as the tower's own code sees them, of which m are left.

    Attributes:
        merge_map: int64 ``(B, S)``, for each row the one of the m that it is in.
        first: int64 ``(B, m)``, for each of the m its first row.
        sizes: float32 ``(B, m)``, how many rows each stands for.
        wanted: the number of patches to leave.
        keys: of the block that runs, mean over heads, ``(B, m, head_dim)``.
        matching: of the block that runs; None where it merges nothing.
    """

    merge_map: torch.Tensor
    first: torch.Tensor
    sizes: torch.Tensor
    wanted: int
    keys: torch.Tensor | None = None
    matching: Matching | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing has been merged yet."""
        return self.first.shape[1] == self.merge_map.shape[1]


class Merger:
    """Merges tokens in the first blocks of a tower, in all its calls while the hooks are on.

    As in the paper, a block's tokens are compared by its keys (mean over heads), merged between its attention and its
    feed-forward layer by means weighted with their sizes, and attention counts every token with its size. Blocks run on
    the tokens that are left, and give one row for every row that the tower's own code expects: the rows of a group are
    copies of its token.

    Merging in the middle of a block is exact, though hooks cannot shorten its residual: the feed-forward layer sees the
    merged tokens, its output is copied to the rows of each group, and the sums of both are averaged by group at the end
    of the block, which is the merged residual plus the output.
    """

    def __init__(
        self,
        tower: Tower,
        last: int,
        merges: int | None,
        keep: Callable[[int], int | None] | None,
        works: Callable[[], bool],
    ) -> None:
        """Binds a merger.

        Args:
            tower: the tower.
            last: the last block that merges, from 0.
            merges: tokens merged in every block; None: as many as leave what `keep` says, evenly over the blocks.
            keep: the number of patches to leave, of the patches of an input.
            works: whether it merges in the calls of this thread (others may run the tower while hooks are put on).

        Raises:
            UnsupportedModelError: tokens cannot be merged inside this tower.
            InputError: neither number is known.
        """
        if merges is None and keep is None:
            raise InputError(
                "groups: how many tokens to merge is not known; give the compressor a number for every block "
                "(r of 'tome'), or the reader the number to keep"
            )
        for block in range(last + 1):
            tower.merge_points(block)
        self._tower, self._last, self._merges, self._keep, self._works = tower, last, merges, keep, works
        self._tokens: _Tokens | None = None

    def hooks(self, told: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
        """Puts the hooks on.

        Args:
            told: gets for each call int64 ``(B, S)``, the first row of the group of each row, after the last block that
                merges.
        """
        handles: list[RemovableHandle] = []
        for block in range(self._last + 1):
            module = self._tower.blocks[block]
            norm, branch = self._tower.merge_points(block)
            handles.append(module.register_forward_pre_hook(self._enter(block)))
            handles += self._tower.bias_attention(block, self._bias)
            handles += self._tower.listen(block, self._hear)
            handles.append(norm.register_forward_pre_hook(self._merge(block)))
            handles.append(branch.register_forward_hook(self._copy))
            # Before the model's own hooks, so that the hidden states that they capture have all rows.
            handles.append(module.register_forward_hook(self._leave(block, told), prepend=True))
        return handles

    def _enter(self, block: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._works():
                return None
            hidden: torch.Tensor = args[0]
            if block == 0:
                self._tokens = self._start(hidden)
            tokens = self._now()
            return None if tokens.whole else (rows(hidden, tokens.first), *args[1:])

        return before

    def _start(self, hidden: torch.Tensor) -> _Tokens:
        batch, count = hidden.shape[:2]
        patches = count - self._tower.prefix
        if self._merges is not None:
            wanted = max(1, patches - self._merges * (self._last + 1))
        else:
            assert self._keep is not None  # checked when bound
            asked = self._keep(patches)
            wanted = patches if asked is None else min(max(1, asked), patches)
        every = torch.arange(count, device=hidden.device).expand(batch, -1)
        return _Tokens(every, every, torch.ones(batch, count, device=hidden.device), wanted)

    def _now(self) -> _Tokens:
        assert self._tokens is not None  # block 0 runs first
        return self._tokens

    def _bias(self) -> torch.Tensor | None:
        if not self._works():
            return None
        tokens = self._now()
        return None if tokens.whole else tokens.sizes.log()

    def _hear(self, heads: Heads) -> None:
        if self._works():
            self._now().keys = heads.keys.float().mean(2)

    def _merge(self, block: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not self._works():
                return None
            tokens = self._now()
            patches = tokens.merge_map.shape[1] - self._tower.prefix
            # Where a block cannot merge its part (half of the tokens is the most), later ones make up for it.
            done = (patches - tokens.wanted) * (block + 1) // (self._last + 1)
            merges = tokens.first.shape[1] - self._tower.prefix - (patches - done)
            tokens.matching, keys, tokens.keys = None, tokens.keys, None
            if merges <= 0:
                return None
            assert keys is not None  # attention ran before
            with torch.no_grad():
                tokens.matching = match(keys, merges, self._tower.prefix)
            return (tokens.matching.mean(args[0], tokens.sizes), *args[1:])

        return before

    def _copy(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        matching = self._now().matching if self._works() else None
        return None if matching is None else rows(output, matching.into)

    def _leave(self, block: int, told: Callable[[torch.Tensor], None]) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._works():
                return None
            tokens, hidden = self._now(), hidden_of(output)
            if tokens.matching is not None:
                hidden = tokens.matching.mean(hidden, tokens.sizes)
                _follow(tokens, tokens.matching)
                tokens.matching = None
            if block == self._last:
                told(tokens.first.gather(1, tokens.merge_map))
                self._tokens = None
            if tokens.whole:
                return None
            hidden = rows(hidden, tokens.merge_map)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return after


def _follow(tokens: _Tokens, matching: Matching) -> None:
    """Brings the merge map, first rows and sizes forward."""
    count = tokens.merge_map.shape[1]
    tokens.merge_map = matching.into.gather(1, tokens.merge_map)
    tokens.sizes = matching.sums(tokens.sizes[..., None])[..., 0]
    every = torch.arange(count, device=tokens.merge_map.device).expand_as(tokens.merge_map)
    none = torch.full_like(matching.kept, count)
    tokens.first = none.scatter_reduce(1, tokens.merge_map, every, "amin")
