"""Dropping and merging visual tokens: pure functions that carry sizes, indices, origins and the merge map along.

Every token counts with its size (how many tokens of the start it stands for), so merging twice gives what one merge
with the composed map gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

from ...core.ops import unit_length
from ...core.tokens import CLS, MERGED, ImageTokens, VisualTokens
from ..compressors.base import Compressor

C = TypeVar("C", bound=Compressor)


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

    Sums by group are products with this matrix: unlike a scatter they come out the same every time on a GPU.

    Args:
        into: int64 ``(n,)``, the group of each token, -1 for none.
        groups: how many groups.
        weights: float32 ``(n,)``.
    """
    return torch.where(into[None] == torch.arange(groups, device=into.device)[:, None], weights[None], 0.0)


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
    matrix = members(into, len(leaders), weights)
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = torch.tensordot(matrix.to(dtype), values.to(dtype), dims=1)
    shape = (-1, *(1,) * (values.dim() - 1))
    means = (sums / matrix.sum(1).view(shape)).to(values.dtype)
    alone = (matrix > 0).sum(1).view(shape) == 1
    return torch.where(alone, values[leaders], means)


def keep(tokens: VisualTokens, kept: torch.Tensor) -> VisualTokens:
    """Some of the tokens, the others dropped.

    Args:
        tokens: n tokens.
        kept: int64 ``(m,)``, rising indices of the n.
    """
    into = leaders_lead(torch.full_like(tokens.token_index, -1), kept)
    signals = {one: value if one.kind == "cls" else value[kept] for one, value in tokens.signals.items()}
    return VisualTokens(
        tokens.features[kept],
        tokens.origins.select(kept.cpu()),
        tokens.sizes[kept],
        tokens.token_index[kept],
        _brought_forward(tokens.merge_map, into),
        signals,
        tokens.cls,
        tokens.seed,
    )


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
    groups, sizes = len(leaders), tokens.sizes
    if features is None:
        features = group_mean(tokens.features, sizes, into, leaders)
    return VisualTokens(
        features,
        _merged_origins(tokens.origins, leaders.cpu(), into.cpu()),
        members(into, groups, sizes).sum(1),
        tokens.token_index[leaders],
        _brought_forward(tokens.merge_map, into),
        {
            one: value if one.kind == "cls" else group_mean(value, sizes, into, leaders)
            for one, value in tokens.signals.items()
        },
        tokens.cls,
        tokens.seed,
    )


def with_class(tokens: VisualTokens, token: torch.Tensor) -> VisualTokens:
    """The tokens with the class token ``(D,)`` before them: of size 1, without a place, and without signals (zeros)."""

    def before(values: torch.Tensor, first: float) -> torch.Tensor:
        return torch.cat([values.new_full((1, *values.shape[1:]), first), values])

    zero, own = torch.zeros(1, dtype=torch.int64), tokens.origins
    origins = ImageTokens(
        torch.cat([zero + CLS, own.kind]),
        torch.cat([own.frame[:1], own.frame]) if own.tokens else zero,
        torch.cat([zero, own.row]),
        torch.cat([zero, own.column]),
        torch.cat([zero + 1, own.size]),
        own.grids,
        own.placed,
    )
    return VisualTokens(
        torch.cat([token[None].to(tokens.features.dtype), tokens.features]),
        origins,
        before(tokens.sizes, 1.0),
        before(tokens.token_index, -1),
        torch.where(tokens.merge_map < 0, tokens.merge_map, tokens.merge_map + 1),
        {one: value if one.kind == "cls" else before(value, 0.0) for one, value in tokens.signals.items()},
        None,  # it is among the tokens now
        tokens.seed,
    )


def without_class(tokens: VisualTokens) -> VisualTokens:
    """The tokens after the class token that stands before them."""
    return VisualTokens(
        tokens.features[1:],
        tokens.origins.select(torch.arange(1, tokens.tokens)),
        tokens.sizes[1:],
        tokens.token_index[1:],
        torch.where(tokens.merge_map < 0, tokens.merge_map, tokens.merge_map - 1),
        {one: value if one.kind == "cls" else value[1:] for one, value in tokens.signals.items()},
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


def _brought_forward(merge_map: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    return torch.where(merge_map < 0, -1, into[merge_map.clamp_min(0)])


def _merged_origins(origins: ImageTokens, leaders: torch.Tensor, into: torch.Tensor) -> ImageTokens:
    """Of the leaders, of kind "merged" and with the sizes of all members where there are several."""
    groups = len(leaders)
    slot = torch.where(into < 0, groups, into)
    count = torch.bincount(slot, minlength=groups + 1)[:groups]
    size = torch.zeros(groups + 1, dtype=torch.int64).index_add_(0, slot, origins.size)[:groups]
    own = origins.select(leaders)
    kind = torch.where(count > 1, MERGED, own.kind)
    return ImageTokens(kind, own.frame, own.row, own.column, size, own.grids, own.placed)
