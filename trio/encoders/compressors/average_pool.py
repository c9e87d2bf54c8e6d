"""Averages over the cells of a grid."""

from __future__ import annotations

from ...core.flops import projector_flops
from ...core.shape import ModelShape
from ...core.tokens import VisualTokens
from ..reading.grid import cells
from ..reading.merge import merge, patches_only
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("average-pool")
class AveragePool(Compressor):
    """Averages the tokens of each of k near-equal cells of the picture, a floor for methods that merge.

    Exactly k tokens for any grid: bands of rows, each cut into its part of the cells. Where k cells fit the grid
    (24 x 24 into 12 x 12) this is average pooling; elsewhere cells hold near-equal numbers of tokens.
    """

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        middles, into = (index.to(tokens.token_index.device) for index in cells(tokens.origins, k))
        return merge(tokens, middles, into)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """The averages pass the projector."""
        return projector_flops(shape, keep)
