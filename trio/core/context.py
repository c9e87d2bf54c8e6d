"""What a scorer sees of the running forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from .probe import Probe
from .tokens import ImageTokens

ProbeName = Literal["next", "last", "ran"]


@dataclass(frozen=True)
class LayerContext:
    """Read-only view of the point between two decoder layers at which a stage stands.

    B samples, S columns of the sequence (padding included), D features, N the largest number of visual tokens that a
    sample still has.

    Attributes:
        hidden: ``(B, S, D)``, the hidden states that enter the next layer.
        visual: bool ``(B, S)``, True at visual tokens.
        valid: bool ``(B, S)``, False at padding.
        visual_index: int64 ``(B, N)``, the columns of the visual tokens in rising order (anything where not valid).
        visual_valid: bool ``(B, N)``.
        origin: int64 ``(B, N)``, the place of each visual token among those that the sample started with.
        images: for each sample its images, with the tokens that they started with.
        counts: for each sample the visual tokens that each of its images still has.
        seeds: one 32-bit number for each sample, made from its prompt, the same in any batch.
        after_layer: decoder layers already run.
        num_layers: decoder layers of the model.
    """

    hidden: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    visual_index: torch.Tensor
    visual_valid: torch.Tensor
    origin: torch.Tensor
    images: tuple[tuple[ImageTokens, ...], ...]
    counts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    after_layer: int
    num_layers: int
    probes: Mapping[ProbeName, Callable[[], Probe]] = field(default_factory=dict, repr=False)

    def probe(self, which: ProbeName = "next") -> Probe:
        """The view into a decoder layer.

        ``"next"``: the layer about to run, on the hidden states that enter it. ``"last"``: the layer that has just
        run, applied once more to those hidden states. ``"ran"``: the layer that has just run, on its own inputs.
        """
        return self.probes[which]()

    def after_pictures(self) -> torch.Tensor:
        """Where the text behind a sample's last visual token stands: bool ``(B, S)``; all its tokens if there is none.

        That is the question where pictures come first, and what the chat template puts behind it.
        """
        ahead = self.visual.flip(1).cumsum(1).flip(1)  # visual tokens at a column and behind it
        text = self.valid & (ahead == 0)
        return torch.where(text.any(1, keepdim=True), text, self.valid)

    def at_visual(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(B, S)`` at the visual tokens: float32 ``(B, N)``, -inf where a sample has fewer."""
        picked = values.float().to(self.visual_index.device).gather(1, self.visual_index)
        return picked.masked_fill(~self.visual_valid, float("-inf"))
