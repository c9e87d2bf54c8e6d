"""What the runtime wants of a model; adapters give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from trio.origins import ImageTokens
from trio.probe import LayerInputs, Probe
from trio.prompts import InputsFactory
from trio.runtime.upstream import Upstream

if TYPE_CHECKING:
    from trio.encoders.base import Signal
    from trio.encoders.reader import Reader


#: Beside an encoder method's arguments: a tuple with the feature rows of each image that it gave, where that is known.
FEATURE_COUNTS = "__features__"


@dataclass(frozen=True)
class TinyModel:
    """A tiny random model of a backbone's classes, to try the promises of the runtime on.

    Attributes:
        backbone: its own backbone.
        inputs: makes batches for it.
        unwritten: ids that it must not generate, because they stand for images that are not there.
    """

    backbone: Backbone
    inputs: InputsFactory
    unwritten: tuple[int, ...] = ()


class PictureLayout(Protocol):
    """Where the visual tokens of a call stand (see `trio.adapters.base.Layout`)."""

    @property
    def visual(self) -> torch.Tensor:
        """bool ``(B, S)`` on the CPU."""

    @property
    def images(self) -> tuple[tuple[ImageTokens, ...], ...]:
        """The images of each sample."""

    @property
    def modalities(self) -> tuple[tuple[str, ...], ...] | None:
        """What encoded them; None: all images."""


class Patches(Protocol):
    """Which patches the visual tokens of an image stand for (see `trio.adapters.patches.PatchMap`)."""

    @property
    def patches(self) -> torch.Tensor:
        """int64 ``(n, p)`` on the CPU."""

    @property
    def tile(self) -> torch.Tensor:
        """int64 ``(n,)`` on the CPU."""

    @property
    def total(self) -> int:
        """Patches of the image."""


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
    def upstream(self) -> Upstream:
        """How this release of transformers calls the model's parts."""

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

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> Patches | None:
        """Which patches visual tokens stand for."""

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """How many images an encoding brought."""

    @property
    def projected_blocks(self) -> tuple[int, ...]:
        """Blocks of the tower whose outputs the projector maps patch by patch."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of these blocks as the language model sees them."""

    def tower_offers(self) -> frozenset[str]:
        """Kinds of signals that the tower offers."""

    def reader(self, signals: Sequence[Signal], *, keep: Callable[[int], int | None] | None = None) -> Reader:
        """A reader of the tower; `keep` says how many of an input's patches to leave where tokens merge inside."""

    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None:
        """Visual features that are added between layers."""

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embeddings for positions."""

    def take_positions(self, embeddings: Any, index: torch.Tensor) -> Any:
        """Rotary embeddings of chosen columns."""

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer."""

    @property
    def allowed_positions(self) -> frozenset[Literal["compact", "original"]]:
        """Numberings of the survivors that the rotary embeddings allow."""

    def tiny(self) -> TinyModel | None:
        """A tiny random model of the same classes; None where none is known."""

    def probe(self, layer: int, inputs: LayerInputs) -> Probe:
        """The view into a layer."""
