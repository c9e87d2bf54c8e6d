"""Top-k: the most salient tokens."""

from __future__ import annotations

import torch

from ..core.context import SelectionContext
from ..core.ops import first_k, ranking
from ..core.shape import ModelShape
from .base import SELECTORS, Selector


@SELECTORS.register("top-k", aliases=("topk",))
class TopK(Selector):
    """Keeps the k most salient tokens of each group; ties go to the lower index."""

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        return first_k(ranking(ctx.saliency, ctx.valid), ctx.k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Sorting is not counted."""
        return 0
