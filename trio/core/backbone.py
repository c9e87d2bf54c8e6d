"""What the runtime wants of a model; adapters implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from .hooking import Owner
from .patches import PatchMap
from .probe import LayerInputs, Probe
from .prompts import InputsFactory
from .tokens import ImageTokens, Signal
from .transfer import HostValues
from .upstream import Upstream

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


@dataclass(frozen=True)
class PromptLayout:
    """Where the visual tokens of a call stand.

    Attributes:
        visual: bool ``(B, S)`` on the CPU.
        images: for each sample its images in the order of the sequence; their tokens add up to the sample's True.
        modalities: for each of these images the modality that encoded it; None: all ``image``.
    """

    visual: torch.Tensor
    images: tuple[tuple[ImageTokens, ...], ...]
    modalities: tuple[tuple[str, ...], ...] | None = None


class TowerReader(Protocol):
    """Reads signals off a vision tower while it runs (see `trio.encoders.reading.reader.Reader`)."""

    def attach(self, owner: Owner | None = None) -> None:
        """Puts the hooks on."""

    def detach(self) -> None:
        """Takes them off."""

    def looked(self, values: HostValues) -> None:
        """What the host knows of the tensors that the tower is given."""

    def clear(self) -> None:
        """Forgets what was read."""

    def take(self) -> Any:
        """What was read since the last time."""


class Backbone(ABC):
    """One model, as the runtime sees it; `trio.adapters.base.Adapter` says what each method does, and has defaults.

    Attributes:
        model: the model that users call.
        pixels: arguments of `multimodal` that hold pixels.
        encoders: methods of `multimodal` that encode images, by modality.
        allowed_positions: numberings of the survivors that the rotary embeddings allow.
    """

    pixels: ClassVar[tuple[str, ...]]
    encoders: ClassVar[Mapping[str, str]]
    allowed_positions: ClassVar[frozenset[Literal["compact", "original"]]]

    model: nn.Module

    @property
    @abstractmethod
    def multimodal(self) -> nn.Module:
        """The module that merges text and images."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The text decoder."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""

    @property
    @abstractmethod
    def upstream(self) -> Upstream:
        """How this release of transformers calls the model's parts."""

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """The decoder's configuration."""

    @abstractmethod
    def brings_images(self, call: Mapping[str, Any]) -> bool:
        """Whether a call brings images."""

    @abstractmethod
    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Where visual tokens stand."""

    @abstractmethod
    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """Which patches visual tokens stand for."""

    @abstractmethod
    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """How many images an encoding brought."""

    @property
    @abstractmethod
    def projected_blocks(self) -> tuple[int, ...]:
        """Blocks of the tower whose outputs the projector maps patch by patch."""

    @abstractmethod
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Rows of these blocks as the language model sees them."""

    @abstractmethod
    def tower_offers(self) -> frozenset[str]:
        """Kinds of signals that the tower offers."""

    @abstractmethod
    def reader(self, signals: Sequence[Signal], *, keep: Callable[[int], int | None] | None = None) -> TowerReader:
        """A reader of the tower; `keep` says how many of an input's patches to leave where tokens merge inside."""

    @abstractmethod
    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None:
        """Visual features that are added between layers."""

    @abstractmethod
    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embeddings for positions."""

    @abstractmethod
    def take_positions(self, embeddings: Any, index: torch.Tensor) -> Any:
        """Rotary embeddings of chosen columns."""

    @abstractmethod
    def window(self, layer: int) -> int | None:
        """The sliding window of a layer."""

    @abstractmethod
    def tiny(self) -> TinyModel | None:
        """A tiny random model of the same classes; None where none is known."""

    @abstractmethod
    def probe(self, layer: int, inputs: LayerInputs) -> Probe:
        """The view into a layer."""
