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
    def multimodal(self) -> nn.Module: ...  # noqa: D102

    @property
    def language_model(self) -> nn.Module: ...  # noqa: D102

    @property
    def layers(self) -> Sequence[nn.Module]: ...  # noqa: D102

    @property
    def text_config(self) -> Any: ...  # noqa: D102

    def brings_pictures(self, call: Mapping[str, Any]) -> bool: ...  # noqa: D102

    @property
    def pixels(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def encoders(self) -> Mapping[str, str]: ...  # noqa: D102

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PictureLayout: ...  # noqa: D102

    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None: ...  # noqa: D102

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any: ...  # noqa: D102

    def take_positions(self, embeddings: Any, index: torch.Tensor) -> Any: ...  # noqa: D102

    def window(self, layer: int) -> int | None: ...  # noqa: D102

    def probe(self, layer: int, inputs: LayerInputs) -> Probe: ...  # noqa: D102
