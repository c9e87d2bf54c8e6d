"""Dropping and merging visual tokens: pure functions that carry sizes, indices, origins and the merge map along.

These are for one input, which is how a method is written down; `trio.encoders.reading.batched` has them for many.

Every token counts with its size (how many tokens of the start it stands for), so merging twice gives what one merge
with the composed map gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

import torch

from ...core.ops import unit_length
from ...core.token_batch import LazySignals, TokenBatch
from ...core.tokens import CLS, VisualTokens
from . import batched

if TYPE_CHECKING:
    from ..compressors.base import Compressor

C = TypeVar("C", bound="Compressor")


def ranking(values: torch.Tensor) -> torch.Tensor:
    """Indices ``(n,)`` by falling value, ties to the lower index; `values` is ``(n,)``."""
    return values.sort(descending=True, stable=True).indices


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The indices of the k largest of ``(n,)``, rising, ties to the lower index."""
    return ranking(values)[:k].sort().values


def most_similar(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """For each of ``(n, D)`` the one of ``(m, D)`` with the highest cosine, int64 ``(n,)``; ties to the lower."""
    return (unit_length(features) @ unit_length(targets).T).argmax(1)


def leaders_lead(chosen: torch.Tensor, leaders: torch.Tensor) -> torch.Tensor:
    """The map `chosen` ``(n,)`` with leader i itself in group i; `leaders` is ``(m,)``, values are -1 to m - 1."""
    return chosen.index_copy(0, leaders, torch.arange(len(leaders), device=leaders.device))


def members(into: torch.Tensor, groups: int, weights: torch.Tensor) -> torch.Tensor:
    """float32 ``(groups, n)``, the weight of each token in the row of its group, 0 elsewhere.

    Args:
        into: int64 ``(n,)``, the group of each token, -1 for none.
        groups: how many groups.
        weights: float32 ``(n,)``.
    """
    return batched.members(into[None], groups, weights[None])[0]


def group_mean(values: torch.Tensor, weights: torch.Tensor, into: torch.Tensor, leaders: torch.Tensor) -> torch.Tensor:
    """Weighted means of groups of tokens, computed in at least float32.

    Args:
        values: ``(n, ...)``.
        weights: float32 ``(n,)``, positive.
        into: int64 ``(n,)``, the group of each token, -1 for none.
        leaders: int64 ``(m,)``, a token of each group; where it is the only one its value is copied bit by bit.

    Returns:
        ``(m, ...)`` in the dtype of `values`.
    """
    return batched.group_mean(values[None], weights[None], into[None], leaders[None])[0]


def keep(tokens: VisualTokens, kept: torch.Tensor) -> VisualTokens:
    """Some of the tokens, the others dropped.

    Args:
        tokens: n tokens.
        kept: int64 ``(m,)``, rising indices of the n.
    """
    into = leaders_lead(torch.full_like(tokens.token_index, -1), kept)
    return batched.keep_at(TokenBatch.stack([tokens]), kept[None], into[None], [len(kept)]).unstack()[0]


def merge(
    tokens: VisualTokens, leaders: torch.Tensor, into: torch.Tensor, features: torch.Tensor | None = None
) -> VisualTokens:
    """Groups of tokens become one token each, which stands at the place of the group's leader.

    Sizes add up. Features and signals are means weighted by size, so that every token of the start counts the same.

    Args:
        tokens: n tokens.
        leaders: int64 ``(m,)``, rising indices of the n, one of each group.
        into: int64 ``(n,)``, the group of each token, -1 where it is dropped; ``into[leaders[i]] == i``.
        features: ``(m, D)`` in place of the weighted means, for methods that combine otherwise.
    """
    combined = None if features is None else features[None]
    batch = TokenBatch.stack([tokens])
    return batched.merge_at(batch, leaders[None], into[None], [len(leaders)], combined).unstack()[0]


def with_class(tokens: VisualTokens, token: torch.Tensor) -> VisualTokens:
    """The tokens with the class token ``(D,)`` before them: of size 1, without a place, and without signals (zeros)."""
    return batched.with_class(replace(TokenBatch.stack([tokens]), cls=token[None])).unstack()[0]


def without_class(tokens: VisualTokens) -> VisualTokens:
    """The tokens after the class token that stands before them."""
    return VisualTokens(
        tokens.features[1:],
        tokens.origins.select(torch.arange(1, tokens.tokens)),
        tokens.sizes[1:],
        tokens.token_index[1:],
        torch.where(tokens.merge_map < 0, tokens.merge_map, tokens.merge_map - 1),
        LazySignals(tokens.signals, lambda one, value: value if one.kind == "cls" else value[1:]),
        None,
        tokens.seed,
    )


def patches_only(
    compress: Callable[[C, VisualTokens, int], VisualTokens],
) -> Callable[[C, VisualTokens, int], VisualTokens]:
    """For `Compressor.compress`: what every method does alike, so that the method itself sees patches only.

    With k = n the tokens come back as they are. A class token that an earlier compression kept stays, as one of the k.
    """

    @wraps(compress)
    def apart(self: C, tokens: VisualTokens, k: int) -> VisualTokens:
        if k == tokens.tokens and not self.decides_count:
            return tokens
        if int(tokens.origins.kind[0]) != CLS:
            return compress(self, tokens, k)
        if k == 1:
            return keep(tokens, tokens.token_index.new_zeros(1))
        return with_class(compress(self, without_class(tokens), k - 1), tokens.features[0])

    return apart
