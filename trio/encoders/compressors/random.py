"""Random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ...core.shape import ModelShape
from ...core.token_batch import TokenBatch
from ...core.transfer import upload
from ..reading.batched import keep, largest, per_input
from .base import COMPRESSORS, BatchCompressor


@COMPRESSORS.register("random")
class RandomTokens(BatchCompressor):
    """Keeps tokens drawn at random, a floor that every method must beat, and a strong one (arXiv 2511.02650).

    The draw comes from `VisualTokens.seed`, so that an image keeps the same tokens in any batch, and the smaller of
    two counts keeps a part of what the larger one keeps.

    Parameters:
        seed: another number gives another draw.
    """

    draws: ClassVar[bool] = True

    seed: int = 0

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""
        device = batch.token_index.device
        draws = [self._draw(seed, start) for seed, start in zip(batch.seeds, batch.starts, strict=True)]
        own = upload(pad_sequence(draws, batch_first=True), device).gather(1, batch.token_index)
        (count,) = per_input(device, k)
        return keep(batch, largest(own, batch.valid, count), k)

    def _draw(self, seed: int, start: int) -> torch.Tensor:
        """A number for each token of the start."""
        generator = torch.Generator().manual_seed((seed ^ (self.seed * 0x9E3779B1)) & 0xFFFFFFFF)
        return torch.rand(start, generator=generator)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Drawing is not counted."""
        return 0

    @classmethod
    def search_space(cls) -> None:
        """None: methods are compared with it."""
        return None
