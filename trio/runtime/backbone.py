"""What the runtime wants of a model; adapters give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from trio.origins import ImageTokens
from trio.probe import LayerInputs, Probe


class PictureLayout(Protocol):
    """Where the visual tokens of a call stand (see `trio.adapters.base.Layout`)."""

    @property
    def visual(self) -> torch.Tensor:
        """bool ``(B, S)`` on the CPU."""

    @property
    def images(self) -> tuple[tuple[ImageTokens, ...], ...]:
        """The images of each sample."""


class Backbone(Protocol):
    """The part of an adapter that the runtime uses; see `trio.adapters.base.Adapter` for what each does."""

    model: nn.Module

    @property
    def multimodal(self) -> nn.Module:
        """The module that merges text and pictures."""

    @property
    def language_model(self) -> nn.Module:
        """The text decoder."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""

    @property
    def text_config(self) -> Any:
        """The decoder's configuration."""

    def brings_pictures(self, call: Mapping[str, Any]) -> bool:
        """Whether a call brings pictures."""

    @property
    def pixels(self) -> tuple[str, ...]:
        """Arguments that hold pixels."""

    @property
    def encoders(self) -> Mapping[str, str]:
        """Encoder methods by modality."""

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PictureLayout:
        """Where visual tokens stand."""

    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None:
        """Visual features that are added between layers."""

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Rotary embeddings for positions."""

    def take_positions(self, embeddings: Any, index: torch.Tensor) -> Any:
        """Rotary embeddings of chosen columns."""

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer."""

    def probe(self, layer: int, inputs: LayerInputs) -> Probe:
        """The view into a layer."""
