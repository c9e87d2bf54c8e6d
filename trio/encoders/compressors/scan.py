"""Scan: the best tokens of each window, the best of the whole picture, and the rest merged into them (VScan)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from ...core.flops import similarity_flops
from ...core.shape import ModelShape
from ...core.tokens import Signal, VisualTokens
from ..reading.grid import windows
from ..reading.merge import keep, largest, leaders_lead, merge, most_similar, patches_only, ranking
from .base import COMPRESSORS, Compressor, Space


@COMPRESSORS.register("scan", aliases=("vscan",))
class Scan(Compressor):
    """Local tokens by windows, global tokens, and a merge of the rest (VScan, arXiv 2505.22654; TRIO's encoder side).

    A part of the k tokens is chosen locally: in each window the ones with the highest attention from the class token
    (in towers without one: received by all patches) in a shallow block. The others are those with the highest attention
    in a deep block. Where windows do not give the local part in full, the deep block fills up. Every token left is
    averaged into the kept token to which it is most cosine-similar where features enter the language model.

    What is left over at the bottom and at the right of the grid joins the last windows; a side shorter than a window is
    one window. The defaults are those of the published code for CLIP towers; its Qwen2.5-VL code is ``{window: 4,
    limit: ceil, local_layer: 0, global_layer: -1}`` (of windowed towers a layer means the next block that sees the
    whole picture).

    Parameters:
        local: share of the k tokens that is chosen locally, rounded down (published: 0.5).
        window: rows and columns of a window (published: 6 for CLIP, 4 for Qwen2.5-VL).
        limit: how many local tokens a window may give, the local part by the number of windows rounded so: with
            ``"floor"`` each gives that many (published for CLIP; falls short where windows do not divide the local
            part), with ``"ceil"`` the best are taken while their windows have room (published for Qwen2.5-VL).
        local_layer: the shallow block (published: 5 of 24; Qwen2.5-VL: the first that sees the whole picture).
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

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        shallow, deep = (tokens.signals[signal] for signal in self.reads())
        window, count = windows(tokens.origins, self.window)
        locals_ = best_in_windows(shallow, window.to(shallow.device), count, int(k * self.local), self.limit)
        kept = largest(deep.masked_fill(locals_, float("inf")), k)
        if not self.merge:
            return keep(tokens, kept)
        return merge(tokens, kept, leaders_lead(most_similar(tokens.features, tokens.features[kept]), kept))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Similarities of all tokens with the kept ones."""
        return similarity_flops(shape, visual, keep)


def best_in_windows(
    attention: torch.Tensor, window: torch.Tensor, windows: int, wanted: int, limit: Literal["floor", "ceil"]
) -> torch.Tensor:
    """The best tokens of each window.

    Args:
        attention: float32 ``(n,)``.
        window: int64 ``(n,)``, the window of each token.
        windows: how many windows there are.
        wanted: how many tokens, all windows together.
        limit: see `Scan`.

    Returns:
        bool ``(n,)``, True at no more than `wanted` tokens.
    """
    most = wanted // windows if limit == "floor" else -(-wanted // windows)
    order = ranking(attention)
    same = window[order][:, None] == torch.arange(windows, device=window.device)
    rank = (same.cumsum(0) * same).sum(1)  # from 1, within the token's window
    chosen = rank <= most
    chosen &= chosen.cumsum(0) <= wanted
    return torch.zeros_like(chosen).index_copy(0, order, chosen)
