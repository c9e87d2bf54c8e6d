"""Dropping and merging the visual tokens of many inputs at once: as `trio.encoders.reading.merge`, with a row for each.

G inputs, padded to N tokens; what is chosen of them is padded to M. Shapes follow from counts that the host knows, so
that nothing waits for the device, and the number of operations does not depend on G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...core.token_batch import LazySignals, TokenBatch
from ...core.tokens import CLS, MERGED, ImageTokens, Signal
from ...core.transfer import upload
from .blocks import row_blocks


def per_input(device: torch.device, *numbers: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """For each list of G numbers int64 ``(G, 1)``, all copied at once."""
    return upload(torch.tensor(numbers), device).unsqueeze(-1).unbind(0)


def ranking(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Token indices ``(G, N)`` by falling value, ties to the lower index, padding last (None: there is none)."""
    values = values if valid is None else values.masked_fill(~valid, float("-inf"))
    return values.sort(dim=1, descending=True, stable=True).indices


def largest(values: torch.Tensor, valid: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """bool ``(G, N)``, True at the k ``(G, 1)`` largest of each row, ties to the lower; k is at most the count."""
    return first_of(ranking(values, valid), k)


def first_of(order: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """bool ``(G, N)``, True at the first k ``(G, 1)`` of a ranking ``(G, N)``."""
    ranks = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ranks < k)


def in_order(chosen: torch.Tensor, most: int) -> torch.Tensor:
    """The indices of the True of bool ``(G, N)``, rising: int64 ``(G, most)``, behind them those of other tokens."""
    return chosen.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]


def slots(chosen: torch.Tensor) -> torch.Tensor:
    """For each True of bool ``(G, N)`` how many come before it: int64 ``(G, N)``; elsewhere without a meaning."""
    return chosen.cumsum(1) - 1


def rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``(G, M)`` of ``(G, N, ...)``: ``(G, M, ...)``."""
    if values.ndim == 2:
        return values.gather(1, index)
    return values[torch.arange(len(index), device=index.device)[:, None], index]


def most_similar(unit: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """For each token the most similar target, int64 ``(G, N)``; ties to the lower.

    Args:
        unit: float32 ``(G, N, D)`` of length 1.
        targets: int64 ``(G, M)``, indices of the N.
        valid: bool ``(G, M)``, False at targets that do not exist; None: all do.
    """
    similarity = unit @ rows(unit, targets).transpose(1, 2)
    if valid is not None:
        similarity.masked_fill_(~valid[:, None], float("-inf"))
    return similarity.argmax(2)


def members(into: torch.Tensor, groups: int, weights: torch.Tensor, first: int = 0) -> torch.Tensor:
    """float32 ``(G, groups, N)``, the weight of each token in the row of its group, 0 elsewhere.

    Sums by group are products with this matrix: unlike a scatter they come out the same every time on a GPU.

    Args:
        into: int64 ``(G, N)``, the group of each token, -1 for none.
        groups: how many groups.
        weights: float32 ``(G, N)``.
        first: the first of the groups.
    """
    same = into[:, None] == torch.arange(first, first + groups, device=into.device)[:, None]
    return torch.where(same, weights[:, None], 0.0)


def group_mean(values: torch.Tensor, weights: torch.Tensor, into: torch.Tensor, leaders: torch.Tensor) -> torch.Tensor:
    """Weighted means of groups of tokens, computed in at least float32.

    Args:
        values: ``(G, N, ...)``.
        weights: float32 ``(G, N)``, positive where tokens are in a group.
        into: int64 ``(G, N)``, the group of each token, -1 for none.
        leaders: int64 ``(G, M)``, a token of each group; where it is the only one its value is copied bit by bit.

    Returns:
        ``(G, M, ...)`` in the dtype of `values`; behind the groups of an input values without a meaning.
    """
    flat = values.flatten(2) if values.ndim > 2 else values[..., None]
    dtype = torch.promote_types(values.dtype, torch.float32)
    wide, own, parts = flat.to(dtype), rows(flat, leaders), []
    for block in row_blocks(flat, leaders.shape[1], flat.shape[1]):
        matrix = members(into, block.stop - block.start, weights, first=block.start)
        means = (matrix.to(dtype) @ wide).div_(matrix.sum(2)[..., None]).to(values.dtype)
        several = (matrix > 0).sum(2)[..., None] > 1
        parts.append(torch.where(several, means, own[:, block]))
    return torch.cat(parts, 1).view(*leaders.shape, *values.shape[2:])


def keep(batch: TokenBatch, chosen: torch.Tensor, counts: Sequence[int]) -> TokenBatch:
    """Some of the tokens, the others dropped.

    Args:
        batch: G inputs.
        chosen: bool ``(G, N)``.
        counts: how many of each input are chosen.
    """
    into = torch.where(chosen, slots(chosen), -1)
    return keep_at(batch, in_order(chosen, max(counts)), into, counts)


def keep_at(batch: TokenBatch, leaders: torch.Tensor, into: torch.Tensor, counts: Sequence[int]) -> TokenBatch:
    """As `keep`, of int64 ``(G, M)``, indices of tokens, and int64 ``(G, N)``, each token's place among them or -1."""
    origins, host_index, host_map = _on_the_host(batch, leaders, None, counts)
    return TokenBatch(
        rows(batch.features, leaders),
        tuple(counts),
        origins,
        rows(batch.sizes, leaders),
        leaders if batch.whole else rows(batch.token_index, leaders),
        into if batch.whole else _brought_forward(batch.merge_map, into),
        batch.starts,
        LazySignals(batch.signals, lambda one, value: value if one.kind == "cls" else rows(value, leaders)),
        batch.cls,
        batch.seeds,
        host_index,
        host_map,
    )


def merge(
    batch: TokenBatch,
    chosen: torch.Tensor,
    into: torch.Tensor,
    counts: Sequence[int],
    features: torch.Tensor | None = None,
) -> TokenBatch:
    """Groups of tokens become one token each, which stands at the place of the group's leader.

    Sizes add up. Features and signals are means weighted by size, so that every token of the start counts the same.

    Args:
        batch: G inputs.
        chosen: bool ``(G, N)``, the leaders: one of each group, the groups in their order.
        into: int64 ``(G, N)``, the group of each token, -1 where it is dropped and at padding. What it says of leaders
            plays no role: they are in their own group.
        counts: how many leaders each input has.
        features: ``(G, M, D)`` in place of the weighted means, for methods that combine otherwise.
    """
    into = torch.where(chosen, slots(chosen), into)
    return merge_at(batch, in_order(chosen, max(counts)), into, counts, features)


def merge_at(
    batch: TokenBatch,
    leaders: torch.Tensor,
    into: torch.Tensor,
    counts: Sequence[int],
    features: torch.Tensor | None = None,
) -> TokenBatch:
    """As `merge`, of int64 ``(G, M)``, indices of the leaders, and int64 ``(G, N)``, the group of each token."""
    sizes, groups = batch.sizes, leaders.shape[1]
    if features is None:
        features = group_mean(batch.features, sizes, into, leaders)
    # Sizes are whole numbers: their sums are exact in any order.
    summed = sizes.new_zeros(len(counts), groups + 1).scatter_add_(1, torch.where(into < 0, groups, into), sizes)

    def forward(one: Signal, value: torch.Tensor) -> torch.Tensor:
        return value if one.kind == "cls" else group_mean(value, sizes, into, leaders)

    origins, host_index, host_map = _on_the_host(batch, leaders, into, counts)
    return TokenBatch(
        features,
        tuple(counts),
        origins,
        summed[:, :groups],
        leaders if batch.whole else rows(batch.token_index, leaders),
        into if batch.whole else _brought_forward(batch.merge_map, into),
        batch.starts,
        LazySignals(batch.signals, forward),
        batch.cls,
        batch.seeds,
        host_index,
        host_map,
    )


def with_class(batch: TokenBatch) -> TokenBatch:
    """The tokens with the class token before them: of size 1, without a place, and without signals (zeros)."""
    assert batch.cls is not None  # asked for by `Compressor.wants_cls`, and given

    def before(values: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat([values.new_full((len(values), 1, *values.shape[2:]), value), values], 1)

    return replace(
        batch,
        features=torch.cat([batch.cls[:, None].to(batch.features.dtype), batch.features], 1),
        counts=tuple(count + 1 for count in batch.counts),
        origins=tuple(class_origins(one) for one in batch.origins),
        sizes=before(batch.sizes, 1.0),
        token_index=before(batch.token_index, -1),
        merge_map=batch.merge_map + (batch.merge_map >= 0),
        signals=LazySignals(batch.signals, lambda one, value: value if one.kind == "cls" else before(value, 0.0)),
        cls=None,  # it is among the tokens now
        host_index=None if batch.host_index is None else before(batch.host_index, -1),
        host_map=None if batch.host_map is None else batch.host_map + (batch.host_map >= 0),
        whole=False,
    )


def class_origins(own: ImageTokens) -> ImageTokens:
    """The origins with that of a class token before them."""
    zero = torch.zeros(1, dtype=torch.int64)
    return ImageTokens(
        torch.cat([zero + CLS, own.kind]),
        torch.cat([own.frame[:1], own.frame]) if own.tokens else zero,
        torch.cat([zero, own.row]),
        torch.cat([zero, own.column]),
        torch.cat([zero + 1, own.size]),
        own.grids,
        own.placed,
    )


def _brought_forward(merge_map: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    return torch.where(merge_map < 0, -1, into.gather(1, merge_map.clamp_min(0)))


def _on_the_host(
    batch: TokenBatch, leaders: torch.Tensor, into: torch.Tensor | None, counts: Sequence[int]
) -> tuple[tuple[ImageTokens, ...], torch.Tensor | None, torch.Tensor | None]:
    """What the host knows of what is left: the one copy from the device that a reduction makes.

    Returns:
        Origins of the leaders; with a map of kind "merged" and with the sizes of all members where there are several.
        And their `token_index` and the `merge_map`, where those of the batch are known.
    """
    most, tokens = leaders.shape[1], batch.features.shape[1]
    host = (leaders if into is None else torch.cat([leaders, into], 1)).cpu()
    went = torch.full((len(host), tokens), -1) if into is None else host[:, most:]
    origins = []
    for g, (own, count) in enumerate(zip(batch.origins, counts, strict=True)):
        kept = own.select(host[g, :count])
        if into is None:
            went[g, host[g, :count]] = torch.arange(count)
        else:
            groups = went[g, : own.tokens] + 1  # 0: dropped
            several = torch.bincount(groups, minlength=count + 1)[1:] > 1
            size = torch.zeros(count + 1, dtype=torch.int64).index_add_(0, groups, own.size)[1:]
            kept = replace(kept, kind=kept.kind.masked_fill(several, MERGED), size=size)
        origins.append(kept)
    index, before = batch.host_index, batch.host_map
    return (
        tuple(origins),
        None if index is None else index.gather(1, host[:, :most]),
        None if before is None else _brought_forward(before, went),
    )
