"""Random tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...core.shape import ModelShape
from ...core.tokens import VisualTokens
from ..reading.merge import keep, largest, patches_only
from .base import COMPRESSORS, Compressor


@COMPRESSORS.register("random")
class RandomTokens(Compressor):
    """Keeps tokens drawn at random, a floor that every method must beat, and a strong one (arXiv 2511.02650).

    The draw comes from `VisualTokens.seed`, so that a picture keeps the same tokens in any batch, and the smaller of
    two counts keeps a part of what the larger one keeps.

    Parameters:
        seed: another number gives another draw.
    """

    draws: ClassVar[bool] = True

    seed: int = 0

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        generator = torch.Generator().manual_seed((tokens.seed ^ (self.seed * 0x9E3779B1)) & 0xFFFFFFFF)
        draws = torch.rand(len(tokens.merge_map), generator=generator)  # one for each token of the start
        return keep(tokens, largest(draws.to(tokens.token_index.device)[tokens.token_index], k))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Drawing is not counted."""
        return 0

    @classmethod
    def search_space(cls) -> None:
        """None: methods are compared with it."""
        return None
