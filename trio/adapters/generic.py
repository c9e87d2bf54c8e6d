"""Any other transformers image-text-to-text model with one feature for each placeholder, found by inspection."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from trio.adapters.base import Adapter, Layout, Positions
from trio.adapters.placeholders import runs_as_images
from trio.errors import UnsupportedModelError
from trio.registry import ADAPTERS

#: Attributes under which models keep their text decoder and their vision tower.
DECODERS = ("language_model", "text_model")
TOWERS = ("vision_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "connector", "projector")


@ADAPTERS.register("generic")
class GenericAdapter(Adapter):
    """Used with a warning where no adapter knows the family.

    A run of placeholders counts as a picture, and so do runs with a single token between them (rows that end with a
    break token). Where the tokens lie on the picture is not known: origins have one row. Inspection refuses models that
    this cannot serve, with the reasons.
    """

    fallback: ClassVar[bool] = True
    encoders: ClassVar[Mapping[str, str]] = {}

    def __init__(self, model: nn.Module) -> None:
        """Inspects the model.

        Raises:
            UnsupportedModelError: the model cannot be served; the message gives the reasons.
        """
        reasons = why_not(model)
        if reasons:
            raise UnsupportedModelError(
                f"model: no adapter knows {type(model).__name__}, and the generic one cannot serve it: "
                f"{'; '.join(reasons)}. Write an adapter for it (docs/add-an-adapter.md)"
            )
        warnings.warn(
            f"no adapter knows {type(model).__name__}; the generic one is used, which was not tested on it: run "
            "`trio check` on your checkpoint",
            stacklevel=4,
        )
        super().__init__(model)
        if _is_multi_axis(self.text_config):
            self.default_positions: Positions = "original"  # type: ignore[misc]  # a fact of this model, not of the class
            self.allowed_positions = frozenset({"original"})  # type: ignore[misc]  # likewise

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model takes pictures and has a placeholder for them; `__init__` looks closer."""
        config = getattr(model, "config", None)
        return hasattr(model, "get_image_features") and getattr(config, "image_token_id", None) is not None

    @property
    def language_model(self) -> nn.Module:
        """The text decoder, without its head."""
        return _one_of(self.multimodal, DECODERS, "text decoder")

    @property
    def vision_tower(self) -> nn.Module:
        """The image encoder."""
        return _one_of(self.multimodal, TOWERS, "vision tower")

    @property
    def projector(self) -> nn.Module:
        """The module between vision tower and language model."""
        return _one_of(self.multimodal, PROJECTORS, "projector")

    def brings_pictures(self, call: Mapping[str, Any]) -> bool:
        """Pixels under any name, or any features that `generate` computed before the forward."""
        encoded = call.get("mm_encoder_outputs") or {}
        pixels = any(name.startswith("pixel_values") and value is not None for name, value in call.items())
        return pixels or any(output is not None for output in encoded.values())

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> Layout:
        """Runs of placeholders, images and videos alike."""
        config: Any = self.model.config
        tokens = [config.image_token_id, getattr(config, "video_token_id", None)]
        return runs_as_images(input_ids, [token for token in tokens if token is not None])

    def _check_positions(self, length: int, device: torch.device) -> torch.Tensor:
        plain = super()._check_positions(length, device)
        return plain.expand(3, 1, -1) if _is_multi_axis(self.text_config) else plain


def why_not(model: nn.Module) -> list[str]:
    """Why the generic adapter cannot serve a model; empty where it can."""
    multimodal = getattr(model, "model", None)
    if not isinstance(multimodal, nn.Module):
        return ["it has no inner `model` that merges text and pictures"]
    decoder = next((getattr(multimodal, name) for name in DECODERS if hasattr(multimodal, name)), None)
    if decoder is None:
        return [f"its inner model has no text decoder under {' or '.join(DECODERS)}"]
    reasons = [
        f"its text decoder has no `{name}`" for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)
    ]
    if "token_type_ids" in inspect.signature(multimodal.forward).parameters:
        reasons.append("it builds masks that look both ways within pictures from token types, above its decoder")
    if "deepstack_visual_embeds" in inspect.signature(decoder.forward).parameters:
        reasons.append("its language model adds visual features between its layers")
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        reasons.append(f"its decoder has layers of other kinds than full attention ({', '.join(sorted(kinds))})")
    if getattr(model.config, "is_encoder_decoder", False):
        reasons.append("it is an encoder-decoder")
    return reasons


def _one_of(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            found: nn.Module = getattr(module, name)
            return found
    raise UnsupportedModelError(f"model: {type(module).__name__} has no {what} under {' or '.join(names)}")


def _is_multi_axis(config: Any) -> bool:
    """Whether positions have time, row and column."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return "mrope_section" in parameters
