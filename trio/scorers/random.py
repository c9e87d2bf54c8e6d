"""Random saliency."""

from __future__ import annotations

import torch

from ..core.context import LayerContext
from ..core.shape import ModelShape
from .base import SCORERS, Scorer


@SCORERS.register("random")
class RandomScorer(Scorer):
    """Uniform random saliency, the floor that every method must beat.

    The numbers of a sample are drawn from its prompt's own seed, for the tokens that it started with, so that it keeps
    the same tokens in any batch, and a later stage keeps a part of what an earlier one would have kept.

    Parameters:
        seed: another number gives another draw.
    """

    seed: int = 0

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values from 0 to 1."""
        draws = torch.zeros(len(ctx.images), max(1, *(sum(i.tokens for i in images) for images in ctx.images), 1))
        for b, images in enumerate(ctx.images):
            generator = torch.Generator().manual_seed((ctx.seeds[b] ^ (self.seed * 0x9E3779B1)) & 0xFFFFFFFF)
            tokens = sum(image.tokens for image in images)
            draws[b, :tokens] = torch.rand(tokens, generator=generator)
        scores = draws.to(ctx.hidden.device).gather(1, ctx.token_index)
        return scores.masked_fill(~ctx.visual_valid, float("-inf"))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Drawing is not counted."""
        return 0

    @classmethod
    def search_space(cls) -> None:
        """None: methods are compared with it."""
        return None
