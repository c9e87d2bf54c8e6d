"""Tokens spread evenly over the picture."""

from __future__ import annotations

from ...core.shape import ModelShape
from ...core.tokens import VisualTokens
from ..reading.grid import cells
from ..reading.merge import keep, patches_only
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("uniform-grid")
class UniformGrid(Compressor):
    """Keeps one token in the middle of each of k near-equal cells of the picture: a floor that looks at nothing.

    Exactly k tokens for any grid; the cells are those of `average-pool`.
    """

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        middles, _ = cells(tokens.origins, k)
        return keep(tokens, middles.to(tokens.token_index.device))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Places are known before."""
        return 0
