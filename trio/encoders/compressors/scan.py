"""Scan: the best tokens of each window, the best of the whole image, and the rest merged into them (VScan)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ...core.flops import similarity_flops
from ...core.ops import unit_length
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch, first
from ...core.tokens import Signal
from ...core.transfer import upload
from ..reading.batched import in_order, keep, largest, merge, most_similar, per_input, ranking
from ..reading.grid import windows_of
from .base import COMPRESSORS, BatchCompressor, Space


@COMPRESSORS.register("scan", aliases=("vscan",))
class Scan(BatchCompressor):
    """Local tokens by windows, global tokens, and a merge of the rest (VScan, arXiv 2505.22654; TRIO's encoder side).

    A part of the k tokens is chosen locally: in each window the ones with the highest attention from the class token
    (in towers without one: received by all patches) in a shallow block. The others are those with the highest attention
    in a deep block. Where windows do not give the local part in full, the deep block fills up. Every token left is
    averaged into the kept token to which it is most cosine-similar where features enter the language model.

    What is left over at the bottom and at the right of the grid joins the last windows; a side shorter than a window is
    one window. The defaults are those of the published code for CLIP towers; its Qwen2.5-VL code is ``{window: 4,
    limit: ceil, local_layer: 0, global_layer: -1}`` (of windowed towers a layer means the next block that sees the
    whole image).

    Parameters:
        local: share of the k tokens that is chosen locally, rounded down (published: 0.5).
        window: rows and columns of a window (published: 6 for CLIP, 4 for Qwen2.5-VL).
        limit: how many local tokens a window may give, the local part by the number of windows rounded so: with
            ``"floor"`` each gives that many (published for CLIP; falls short where windows do not divide the local
            part), with ``"ceil"`` the best are taken while their windows have room (published for Qwen2.5-VL).
        local_layer: the shallow block (published: 5 of 24; Qwen2.5-VL: the first that sees the whole image).
        global_layer: the deep block (published: -2; Qwen2.5-VL: -1).
        merge: whether the tokens left are averaged into kept ones (published) or dropped.
    """

    space: ClassVar[Space] = "language"

    local: Annotated[float, Field(ge=0, le=1)] = 0.5
    window: Annotated[int, Field(ge=1)] = 6
    limit: Literal["floor", "ceil"] = "floor"
    local_layer: int = 5
    global_layer: int = -2
    merge: bool = True

    def reads(self) -> tuple[Signal, ...]:
        """Attention of the shallow and of the deep block."""
        return Signal("attention", self.local_layer), Signal("attention", self.global_layer)

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        device, valid = batch.token_index.device, batch.present
        shallow, deep = (batch.signals[signal] for signal in self.reads())
        window, windows = windows_of(batch.origins, self.window)
        wanted = [int(count * self.local) for count in k]
        up = self.limit == "ceil"
        most = [-(-count // number) if up else count // number for count, number in zip(wanted, windows, strict=True)]
        kept, wanted_, most_ = per_input(device, k, wanted, most)
        locals_ = best_in_windows(shallow, valid, upload(window, device), wanted_, most_)
        chosen = largest(deep.masked_fill(locals_, float("inf")), valid, kept)
        if not self.merge:
            return keep(batch, chosen, k)
        leaders = in_order(chosen, max(k))
        exist = None if min(k) == max(k) else first(k, max(k), device)
        into = most_similar(unit_length(batch.features), leaders, exist)
        return merge(batch, chosen, into if valid is None else into.masked_fill_(~valid, -1), k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all tokens with the kept ones."""
        return similarity_flops(shape, visual, keep)


def best_in_windows(
    attention: torch.Tensor, valid: torch.Tensor | None, window: torch.Tensor, wanted: torch.Tensor, most: torch.Tensor
) -> torch.Tensor:
    """The best tokens of each window, by falling attention, while their window and the input have room.

    Args:
        attention: float32 ``(G, N)``.
        valid: bool ``(G, N)``; None: all are.
        window: int64 ``(G, N)``, the window of each token.
        wanted: int64 ``(G, 1)``, how many tokens, all windows together.
        most: int64 ``(G, 1)``, how many tokens of each window.

    Returns:
        bool ``(G, N)``, True at no more than `wanted` tokens of each input.
    """
    order = ranking(attention, valid)
    in_windows, by_window = window.gather(1, order).sort(dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device)
    rank = place - torch.searchsorted(in_windows, in_windows)  # within the token's window
    chosen = torch.empty_like(order, dtype=torch.bool).scatter_(1, by_window, rank < most)
    if valid is not None:
        chosen &= valid.gather(1, order)
    chosen &= chosen.cumsum(1) <= wanted
    return torch.empty_like(chosen).scatter_(1, order, chosen)
