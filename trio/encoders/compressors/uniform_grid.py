"""Tokens spread evenly over the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch, first
from ...core.transfer import upload
from ..reading.batched import keep
from ..reading.grid import cells_of
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("uniform-grid")
class UniformGrid(BatchCompressor):
    """Keeps one token in the middle of each of k near-equal cells of the image: a floor that looks at nothing.

    Exactly k tokens for any grid; the cells are those of `average-pool`.
    """

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        middles, _ = cells_of(batch.origins, k)
        chosen = torch.zeros(len(k), batch.features.shape[1] + 1, dtype=torch.bool)  # one more, where padding goes
        middles = middles.masked_fill(~first(k, middles.shape[1], middles.device), -1)
        chosen.scatter_(1, middles % chosen.shape[1], True)
        return keep(batch, upload(chosen[:, :-1], batch.token_index.device), k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Places are known before."""
        return 0
