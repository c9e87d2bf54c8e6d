"""FastV's saliency: how much the last prompt token attends to each visual token."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..core.context import LayerContext
from ..core.flops import last_row_flops
from ..core.shape import ModelShape
from .base import SCORERS, Scorer


@SCORERS.register("last-token-attention", aliases=("fastv",))
class LastTokenAttention(Scorer):
    """Attention of the last prompt token in the layer just run, mean over heads (FastV, arXiv 2403.06764).

    Its one row of attention is computed from the layer's own projections, so that the model keeps running on sdpa or
    flash-attention. Not after layer 0, where no layer has run.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention-rows", "ran"})

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values between 0 and 1."""
        attention = ctx.probe("ran").attention_rows(ctx.last_rows(1))
        return ctx.at_visual(attention[:, :, 0].mean(1))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """One query, all keys, one row of scores."""
        return last_row_flops(shape, tokens)
