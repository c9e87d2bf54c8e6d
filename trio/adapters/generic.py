"""Any other transformers image-text-to-text model with one feature for each placeholder, found by inspection."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.backbone import FEATURE_COUNTS
from ..core.shape import ModelShape
from ..core.tokens import ImageTokens
from ..core.upstream import encoder_outputs
from ..errors import InputError, UnsupportedModelError
from . import tiny
from .base import ADAPTERS, Adapter, Positions, PromptLayout
from .generic_costs import SHAPES
from .placeholders import image_rows, images_by_count, images_by_features, unplaced

#: Attributes under which models keep their text decoder and their vision tower.
DECODERS = ("language_model", "text_model")
TOWERS = ("vision_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "connector", "projector", "aligner")
#: Methods that encode images, by the modality's name in ``mm_encoder_outputs``.
ENCODERS = {"image": "get_image_features", "video": "get_video_features"}


@ADAPTERS.register("generic")
class GenericAdapter(Adapter):
    """Used with a warning where no adapter knows the family.

    What the encoder returns as one tensor of features counts as an image (for some families a tile, or a whole video).
    Where the tokens lie on the image is not known: origins have one row. Inspection refuses models that this cannot
    serve, with the reasons.
    """

    fallback: ClassVar[bool] = True
    model_types: ClassVar[frozenset[str]] = frozenset({*SHAPES, *tiny.GENERIC})

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """See `Adapter.cost_shape`; only of the families that were looked at."""
        describe = SHAPES.get(config.model_type)
        return super().cost_shape(config) if describe is None else describe(config)

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
        own = self.multimodal
        found = {modality: method for modality, method in ENCODERS.items() if hasattr(own, method)}
        self.encoders = found  # type: ignore[misc]  # a fact of this model, not of the class
        self.pixels = _pixels(own, found.values())  # type: ignore[misc]  # likewise
        if _axes(self.language_model) > 1:
            self.default_positions: Positions = "original"  # type: ignore[misc]  # likewise
            self.allowed_positions = frozenset({"original"})  # type: ignore[misc]  # likewise

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        return tiny.generic(config)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this is a transformers model; `__init__` looks closer, and says what is missing."""
        from transformers import PreTrainedModel

        return isinstance(model, PreTrainedModel)

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

    def brings_images(self, call: Mapping[str, Any]) -> bool:
        """Pixels under any name, or any features that `generate` computed before the forward."""
        pixels = any(name.startswith("pixel_values") and value is not None for name, value in call.items())
        return pixels or bool(encoder_outputs(call))

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """As many placeholders for each image as the encoder gave it rows of features.

        Idefics and SmolVLM return a sample's images as one tensor, but give all images the same number of rows.
        """
        config: Any = self.model.config
        image: int = config.image_token_id
        if self._rows_of_each is not None:
            return images_by_count(input_ids, image, unplaced(self._rows_of_each))
        video: int | None = getattr(config, "video_token_id", None) if "video" in self.encoders else None
        if "video" in encoded and (video is None or not bool(torch.any(input_ids == video))):
            video = image  # GLM-4V has the image's placeholder where a video's frames belong
        if video == image and {"image", "video"} <= encoded.keys():
            raise InputError(
                f"placeholders: images and videos share the id {image}, and their order is not known; pass them in "
                "separate prompts, or write an adapter (docs/add-an-adapter.md)"
            )
        placeholders = {"image": image} | ({} if video is None else {"video": video})
        if video == image:
            placeholders.pop("image" if "video" in encoded else "video")
        return images_by_features(input_ids, placeholders, encoded)

    def visual_tokens(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """The placeholders of each sample: no encoder has to run for these."""
        config: Any = self.model.config
        tokens = [config.image_token_id, getattr(config, "video_token_id", None)]
        placeholders = torch.tensor([token for token in tokens if token is not None])
        return [int(count) for count in torch.isin(input_ids, placeholders).sum(1)]

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """One for each tensor of features, or as many as their rows make up."""
        if self._rows_of_each is None:
            return len(image_rows(arguments))
        return sum(image_rows(arguments)) // self._rows_of_each if FEATURE_COUNTS in arguments else len(images)

    @property
    def _rows_of_each(self) -> int | None:
        """Rows of features that every image of the model has; None where images differ."""
        rows = getattr(self.multimodal, "image_seq_len", None)
        return rows if isinstance(rows, int) else None

    def _check_positions(self, length: int, device: torch.device) -> torch.Tensor:
        plain = super()._check_positions(length, device)
        axes = _axes(self.language_model)
        return plain.expand(axes, 1, -1) if axes > 1 else plain


def why_not(model: nn.Module) -> list[str]:
    """Why the generic adapter cannot serve a model; empty where it can. Looks at classes and signatures only."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder-decoder"]
    multimodal = getattr(model, "model", None)
    if not isinstance(multimodal, nn.Module):
        return ["it has no inner `model` that merges text and images"]
    reasons = []
    if not hasattr(multimodal, ENCODERS["image"]):
        reasons.append(f"its inner model has no `{ENCODERS['image']}`")
    if getattr(config, "image_token_id", None) is None:
        reasons.append("its configuration has no `image_token_id`, the placeholder of images")
    decoder = next((getattr(multimodal, name) for name in DECODERS if hasattr(multimodal, name)), None)
    if decoder is None:
        return [*reasons, f"its inner model has no text decoder under {' or '.join(DECODERS)}"]
    return [*reasons, *_masks_above(multimodal), *_unlike_llama(decoder)]


def _masks_above(multimodal: nn.Module) -> list[str]:
    """Whether attention masks are made where the pipeline cannot see what they are made of."""
    types = [name for name in inspect.signature(multimodal.forward).parameters if name.endswith("token_type_ids")]
    # mm_token_type_ids alone are harmless: most families compute positions from them.
    code = getattr(inspect.unwrap(type(multimodal).forward), "__code__", None)
    makers = [name for name in getattr(code, "co_names", ()) if name.startswith("create_") and "mask" in name]
    if not makers and "token_type_ids" not in types:
        return []
    source = f" from token types ({', '.join(types)})" if types else ""
    return [f"it builds attention masks{source}, above its decoder{f' ({makers[0]})' if makers else ''}"]


def _unlike_llama(decoder: nn.Module) -> list[str]:
    """What sets a text decoder apart from those that the base class knows."""
    reasons = [
        f"its text decoder has no `{name}`" for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)
    ]
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is not None:
        more = [
            parameter.name
            for parameter in list(inspect.signature(rotary.forward).parameters.values())[2:]
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if more:
            reasons.append(f"its rotary embeddings depend on more than positions ({', '.join(more)})")
    visual = [
        name
        for name in inspect.signature(decoder.forward).parameters
        if any(word in name for word in ("deepstack", "visual", "vision"))
    ]
    if visual:
        reasons.append(f"its language model takes visual features for its inner layers ({', '.join(visual)})")
    config: Any = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        reasons.append(f"its decoder has layers of other kinds than full attention ({', '.join(sorted(kinds))})")
    return reasons


def _pixels(multimodal: nn.Module, methods: Iterable[str]) -> tuple[str, ...]:
    """Names of the arguments of encoder methods that hold pixels."""
    names = (name for method in methods for name in inspect.signature(getattr(multimodal, method)).parameters)
    return tuple(dict.fromkeys(name for name in names if "pixel_values" in name))


def _one_of(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            inner: nn.Module = getattr(module, name)
            return inner
    raise UnsupportedModelError(f"model: {type(module).__name__} has no {what} under {' or '.join(names)}")


def _axes(decoder: Any) -> int:
    """How many axes positions have: one, or time, row, column and what else a family counts."""
    parameters = getattr(decoder.config, "rope_parameters", None) or {}
    # The module knows its class's default where the configuration is silent.
    sections = getattr(decoder.rotary_emb, "mrope_section", None) or parameters.get("mrope_section")
    return len(sections) if sections else 1
