"""The interface of scorers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..core.context import LayerContext
from ..core.part import Part
from ..registry import Registry


class Scorer(Part, ABC):
    """Gives every visual token one number: higher means keep.

    A scorer is a small class whose fields are its validated parameters. `needs` says what it wants of the model's
    adapter; a pipeline that lacks it is refused when it is built. Known needs: ``"objective"`` (gradients of the
    layer-local loss), ``"attention-rows"`` (attention probabilities of chosen rows), ``"ran"`` (the layer that has just
    run, with its own inputs: not after layer 0), ``"last"`` (the layer that has just run: not after layer 0),
    ``"input-embedding"`` (the input embedding as output head).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def required(self) -> frozenset[str]:
        """What this scorer needs with its present parameters; `needs` unless a parameter changes it."""
        return self.needs

    @abstractmethod
    def score(self, ctx: LayerContext) -> torch.Tensor:
        """Saliency of every visual token.

        Returns:
            float32 ``(B, N)``, finite at visual tokens, -inf where a sample has fewer than N.
        """


#: Scorers by name.
SCORERS: Registry[Scorer] = Registry("scorer", Scorer)
