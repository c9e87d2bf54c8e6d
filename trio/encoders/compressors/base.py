"""The interface of compressors: what the encoder side gives them, and what they give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from ...core.part import Part
from ...core.token_batch import TokenBatch
from ...core.tokens import Signal, VisualTokens
from ...registry import Registry
from ..reading.merge import patches_only

Space = Literal["tower", "language"]


class Compressor(Part, ABC):
    """Takes the visual tokens of an image on the encoder side and gives fewer, by dropping or merging.

    A pipeline on a model whose tower cannot give what `reads` names is refused when it is built. One method is enough:
    `compress`. Methods that work on many inputs at once derive from `BatchCompressor`.
    """

    #: Where features are taken and merged: as they leave the tower, or as they enter the language model. Families whose
    #: projector mixes patches have the second alone, and give it in both cases.
    space: ClassVar[Space] = "tower"
    #: True where the method decides the number itself; `compress` is then called with k = n.
    decides_count: ClassVar[bool] = False
    #: True where tokens may get new features also if nothing went into them (they stay of kind ``patch``).
    rewrites: ClassVar[bool] = False
    #: True where it draws from `VisualTokens.seed`, so that another prompt about the image keeps other tokens.
    draws: ClassVar[bool] = False

    def reads(self) -> tuple[Signal, ...]:
        """What it reads off the tower."""
        return ()

    def decided_count(self, tokens: int) -> int | None:
        """Of one that decides the number itself: how many of so many tokens it leaves; None where an image says it."""
        return None

    @property
    def wants_cls(self) -> bool:
        """Whether it may keep the class token as one of its k tokens."""
        return False

    @abstractmethod
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """Reduces to k tokens.

        Args:
            tokens: one input's tokens with the signals asked for.
            k: tokens to keep, between 1 and n.

        Returns:
            The tokens left, in raster order (the class token first), with sizes, token_index and merge_map brought
            forward.
        """

    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """Reduces many inputs, each to what `compress` makes of it alone; one after the other unless overridden.

        Args:
            batch: patches alone, no class token among them.
            k: tokens to keep of each input, between 1 and its count.
        """
        singles = zip(batch.unstack(), k, strict=True)
        return TokenBatch.stack([self.compress(tokens, count) for tokens, count in singles])


class BatchCompressor(Compressor):
    """A compressor whose method works on many inputs at once: as many operations for a hundred tiles as for one."""

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`: a batch of one."""
        return self.compress_batch(TokenBatch.stack([tokens]), [k]).unstack()[0]

    @abstractmethod
    def compress_batch(self, batch: TokenBatch, k: Sequence[int]) -> TokenBatch:
        """See `Compressor.compress_batch`."""


#: Compressors by name.
COMPRESSORS: Registry[Compressor] = Registry("compressor", Compressor)
