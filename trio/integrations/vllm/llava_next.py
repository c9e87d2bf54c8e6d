"""LLaVA-NeXT in vLLM: tiles compressed one by one, newlines as the spec says."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...adapters.tiles import tiled_image, tiled_patches
from ...core.patches import PatchMap
from ...core.tokens import ImageTokens
from .encoding import CompressedItem, EncodedItem, compress_items
from .llava import FAMILY as LLAVA
from .llava import REMEMBERED
from .processing import FIELD, SpecProcessor, spec_of_field
from .settings import KEY, EngineSpec, ServedFamily, pieces_of, read_spec, without_newlines

FAMILY = ServedFamily("LLaVA-NeXT", LLAVA.positions, LLAVA.why, has_newlines=True)


def layout(config: Any, size: tuple[int, int]) -> tuple[ImageTokens, PatchMap]:
    """The tokens of an image, newlines included, and the patches behind those that are no newlines.

    Args:
        config: of the model.
        size: height and width in pixels.
    """
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    image = tiled_image(size, config.image_grid_pinpoints, tile=tile, side=side)
    patches = tiled_patches(without_newlines(image), size, config.image_grid_pinpoints, tile=tile, side=side)
    return image, patches


class TrioLlavaNextProcessor(SpecProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]  # no types here
    """Lays out prompts with as many places for an image as its spec leaves."""

    family = FAMILY

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        height, width = out_mm_kwargs["image"][item]["image_sizes"].data.tolist()
        image, patches = layout(self.info.get_hf_config(), (height, width))
        sizes = [len(piece) for piece in pieces_of(patches.tile)]
        left = sum(spec.counts(sizes))
        newlines = image.tokens - sum(sizes)
        return left + (newlines if left == sum(sizes) or spec.spec.newlines == "always" else 0)


@MULTIMODAL_REGISTRY.register_processor(
    TrioLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TrioLlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration):  # type: ignore[misc]  # no types
    """vLLM's own, whose images have the tokens that their specs leave."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        read_spec(getattr(self.config, KEY, None), FAMILY)
        self.trio_indices: deque[torch.Tensor] = deque(maxlen=REMEMBERED)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of images, each compressed by the spec of its request."""
        fields: Any = kwargs.pop(FIELD, None)
        if fields is None:
            return super().embed_multimodal(**kwargs)
        inputs = self._parse_and_validate_image_input(**kwargs)
        pixels = list(inputs["pixel_values"])  # of each image (tiles, 3, height, width), some padded with empty tiles
        rows = self._image_pixels_to_features(self.vision_tower, torch.cat(pixels))
        items, images = [], []
        for field, size, tiles, features in zip(
            fields, inputs["image_sizes"], pixels, rows.split([len(one) for one in pixels]), strict=True
        ):
            height, width = size.tolist()
            image, patches = layout(self.config, (height, width))
            own = features.flatten(0, 1)[patches.patches[:, 0].to(features.device)]
            spec = spec_of_field(field, FAMILY)
            items.append(EncodedItem(spec, without_newlines(image), pieces_of(patches.tile), own, list(tiles)))
            images.append(image)
        left = compress_items(items, self.multi_modal_projector)
        self.trio_indices.extend(one.indices for one in left)
        return tuple(
            self._with_newlines(image, one, item.spec) for image, one, item in zip(images, left, items, strict=True)
        )

    def _with_newlines(self, image: ImageTokens, left: CompressedItem, spec: EngineSpec) -> torch.Tensor:
        if not left.whole and spec.spec.newlines == "never":
            return left.features
        device = left.features.device
        places = image.is_visual.nonzero().squeeze(1).to(device)[left.indices]
        newlines = (~image.is_visual).nonzero().squeeze(1).to(device)
        rows = torch.cat([left.features, self.image_newline.to(left.features).expand(len(newlines), -1)])
        return rows[torch.cat([places, newlines]).argsort()]
