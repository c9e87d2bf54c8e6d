"""LLaVA-1.5 and LLaVA-NeXT in vLLM, compressed between the tower and the projector.

LLaVA-NeXT's tiles are compressed one by one, and newlines are set as the spec says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.models.clip import CLIPAttention
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
    _get_num_hidden_layers,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...adapters.tiles import tiled_image, tiled_patches
from ...core.patches import PatchMap
from ...core.tokens import ImageTokens
from ...encoders.towers.base import Tower
from ...errors import UnsupportedModelError
from .encoding import CompressedItem, EncodedItem
from .models import ServedModel
from .processing import SpecProcessor
from .seams import peers, unread
from .settings import KEY, EngineSpec, ServedFamily, ServedTower, pieces_of, without_newlines
from .towers import ServedClipTower, of_tokens

_COMPACT = "vLLM numbers the tokens of such a model without gaps, from their place in the prompt"


def _family(config: Any, multimodal: Any, name: str, *, has_newlines: bool = False) -> ServedFamily:
    kind = getattr(config.vision_config, "model_type", "")
    why = unread(multimodal, CLIPAttention, calls=("attn",))
    if kind != "clip_vision_model":
        why = f"it is a {kind!r}, and only 'clip_vision_model' was tested"
    depth = int(config.vision_config.num_hidden_layers)
    tower = ServedTower(depth, _get_num_hidden_layers(config), why=why)
    return ServedFamily(name, "compact", _COMPACT, has_newlines, tower)


def layout(config: Any, size: tuple[int, int]) -> tuple[ImageTokens, PatchMap]:
    """The tokens of an image of LLaVA-NeXT, newlines included, and the patches behind those that are no newlines.

    Args:
        config: of the model.
        size: height and width in pixels.
    """
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    image = tiled_image(size, config.image_grid_pinpoints, tile=tile, side=side)
    patches = tiled_patches(without_newlines(image), size, config.image_grid_pinpoints, tile=tile, side=side)
    return image, patches


class LlavaModel(ServedModel):
    """Mixed into both models: the tower, the projector, and tokens of tiles."""

    def tower(self) -> Tower:
        """See `ServedModel.tower`."""
        model: Any = self
        return ServedClipTower(model.vision_tower, peers())

    def projector(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `ServedModel.projector`."""
        model: Any = self
        projector: Callable[[torch.Tensor], torch.Tensor] = model.multi_modal_projector
        return projector

    def encoded(self, specs: Sequence[EngineSpec], inputs: Any) -> list[EncodedItem]:
        """See `ServedModel.encoded`."""
        model: Any = self
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        tiles = self.tiles(inputs)
        pixels = torch.cat(tiles)
        with_class = any(spec.compressor.wants_cls for spec in specs)

        def run() -> torch.Tensor:
            if not with_class:
                features: torch.Tensor = model._image_pixels_to_features(model.vision_tower, pixels)
                return features
            layers = getattr(model, "select_layers", None)
            rows: torch.Tensor = model.vision_tower(pixels, select_layers=layers, feature_select_strategy="full")
            return rows

        rows, values = self.heard(specs, run)
        classes, rows = (rows[:, 0], rows[:, 1:]) if with_class else (None, rows)
        if rows.shape[1] != side * side:
            raise UnsupportedModelError(
                f"{KEY}: the tower gives {rows.shape[1]} tokens by image for a grid of {side} by {side}; models whose "
                'class token goes to the language model (vision_feature_select_strategy "full") are not supported'
            )
        features, items, first = rows.flatten(0, 1), [], 0
        for number, (spec, own) in enumerate(zip(specs, tiles, strict=True)):
            image, patches = self.tokens_of(inputs, number, side)
            index = patches.patches + first * side * side
            items.append(
                EncodedItem(
                    spec=spec,
                    image=without_newlines(image),
                    pieces=pieces_of(patches.tile),
                    features=features[index[:, 0].to(features.device)],
                    pixels=list(own),
                    signals=of_tokens(values, index, spec),
                    class_tokens=None if classes is None else classes[first : first + len(own)],
                    in_prompt=image,
                )
            )
            first += len(own)
        return items

    def tiles(self, inputs: Any) -> list[torch.Tensor]:
        """Of each image its inputs to the tower, ``(tiles, 3, height, width)``."""
        raise NotImplementedError

    def tokens_of(self, inputs: Any, number: int, side: int) -> tuple[ImageTokens, PatchMap]:
        """An image's tokens, newlines included, and the patches behind those that are no newlines.

        Args:
            inputs: see `encoded`.
            number: of the image.
            side: patches along a side of an input of the tower.
        """
        raise NotImplementedError


class TrioLlavaProcessor(SpecProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]  # vLLM has no types here
    """Lays out prompts with as many places for an image as its spec leaves."""

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        return sum(spec.counts([stock]))

    def sizes(self, height: int, width: int) -> list[int]:
        """See `SpecProcessor.sizes`."""
        return [int(self.info.get_num_image_tokens(image_width=width, image_height=height))]

    @classmethod
    def family_of(cls, config: Any, multimodal: Any) -> ServedFamily:
        """See `SpecProcessor.family_of`."""
        return _family(config, multimodal, "LLaVA")


class TrioLlavaNextProcessor(SpecProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]  # no types here
    """Lays out prompts with as many places for an image as its spec leaves."""

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        height, width = out_mm_kwargs["image"][item]["image_sizes"].data.tolist()
        sizes = self.sizes(height, width)
        left = sum(spec.counts(sizes))
        return left + (stock - sum(sizes) if left == sum(sizes) or spec.spec.newlines == "always" else 0)

    def sizes(self, height: int, width: int) -> list[int]:
        """See `SpecProcessor.sizes`."""
        _, patches = layout(self.info.get_hf_config(), (height, width))
        return [len(piece) for piece in pieces_of(patches.tile)]

    @classmethod
    def family_of(cls, config: Any, multimodal: Any) -> ServedFamily:
        """See `SpecProcessor.family_of`."""
        return _family(config, multimodal, "LLaVA-NeXT", has_newlines=True)


def _processor(info: Any, dummy_inputs: Any, **options: Any) -> Any:
    if isinstance(info, LlavaProcessingInfo):
        return TrioLlavaProcessor(info, dummy_inputs, **options)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class TrioLlavaForConditionalGeneration(LlavaModel, LlavaForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""

    reads_specs = TrioLlavaProcessor

    def tiles(self, inputs: Any) -> list[torch.Tensor]:
        """See `LlavaModel.tiles`: one of each image."""
        return [one[None] for one in inputs["pixel_values"]]

    def tokens_of(self, inputs: Any, number: int, side: int) -> tuple[ImageTokens, PatchMap]:
        """See `LlavaModel.tokens_of`."""
        return ImageTokens.from_grid(side, side), PatchMap.runs(side**2)


@MULTIMODAL_REGISTRY.register_processor(
    TrioLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TrioLlavaNextForConditionalGeneration(LlavaModel, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""

    reads_specs = TrioLlavaNextProcessor

    def tiles(self, inputs: Any) -> list[torch.Tensor]:
        """See `LlavaModel.tiles`: some images are padded with empty ones."""
        return list(inputs["pixel_values"])

    def tokens_of(self, inputs: Any, number: int, side: int) -> tuple[ImageTokens, PatchMap]:
        """See `LlavaModel.tokens_of`."""
        model: Any = self
        height, width = inputs["image_sizes"][number].tolist()
        return layout(model.config, (height, width))

    def laid_out(self, item: EncodedItem, left: CompressedItem) -> torch.Tensor:
        """See `ServedModel.laid_out`: with newlines where the spec wants them."""
        if not left.whole and item.spec.spec.newlines == "never":
            return left.features
        model: Any = self
        device, image = left.features.device, item.in_prompt
        assert image is not None  # `encoded` gives it
        places = image.is_visual.nonzero().squeeze(1).to(device)[left.indices]
        newlines = (~image.is_visual).nonzero().squeeze(1).to(device)
        rows = torch.cat([left.features, model.image_newline.to(left.features).expand(len(newlines), -1)])
        return rows[torch.cat([places, newlines]).argsort()]
