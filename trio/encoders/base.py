"""The interface of compressors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from trio.origins import ImageTokens
from trio.part import Part


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image between vision tower and language model.

    Attributes:
        features: ``(n, D)``, as the tower gives them.
        origins: where the tokens come from.
        sizes: float32 ``(n,)``, how many patches each token stands for.
        signals: what the compressor declared in `Compressor.needs`, by name, first dimension n.
        merged: int64 ``(patches,)``, for each patch of the tower the token that it went into, -1 where it was dropped.
    """

    features: torch.Tensor
    origins: ImageTokens
    sizes: torch.Tensor
    merged: torch.Tensor
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


class Compressor(Part, ABC):
    """Takes the visual tokens of an image on the encoder side and gives fewer, by dropping or merging.

    `needs` names the signals of the vision tower that it reads; a pipeline on a tower that cannot give them is refused
    when it is built.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    #: True where the method decides the number itself.
    decides_count: ClassVar[bool] = False

    @abstractmethod
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """Reduces to k tokens.

        Args:
            tokens: one image's tokens with the signals asked for.
            k: tokens to keep, between 1 and n.

        Returns:
            The tokens left, in raster order, with sizes and merge map brought forward.
        """
