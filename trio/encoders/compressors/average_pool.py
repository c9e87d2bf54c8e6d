"""Averages over the cells of a grid."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.flops import projector_flops
from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.transfer import upload
from ..reading.batched import merge_at
from ..reading.grid import cells_of
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("average-pool")
class AveragePool(BatchCompressor):
    """Averages the tokens of each of k near-equal cells of the image, a floor for methods that merge.

    Exactly k tokens for any grid: bands of rows, each cut into its part of the cells. Where k cells fit the grid
    (24 x 24 into 12 x 12) this is average pooling; elsewhere cells hold near-equal numbers of tokens.
    """

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        middles, into = (upload(index, batch.token_index.device) for index in cells_of(batch.origins, k))
        return merge_at(batch, middles, into, k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """The averages pass the projector."""
        return projector_flops(shape, keep)
