"""LLaVA-NeXT (LLaVA-1.6): any-resolution tiles behind the whole image, with newline tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.patches import PatchMap
from ..core.tokens import ImageTokens
from . import tiny
from .base import ADAPTERS, PromptLayout
from .llava import LlavaAdapter
from .placeholders import encoded_argument, images_in_order
from .tiles import tiled_image, tiled_patches


@ADAPTERS.register("llava-next")
class LlavaNextAdapter(LlavaAdapter):
    """`LlavaNextForConditionalGeneration`: the whole image's tokens, then those of its unpadded grid of tiles.

    Newline tokens are structure, not image: they are in no count, and the spec's `newlines` says when they go.
    """

    labels: ClassVar[Mapping[str, str]] = {"llava-next": "LLaVA-NeXT"}
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "unknown"  # tiles
    model_types: ClassVar[frozenset[str]] = frozenset({"llava_next"})
    whole_beside_tiles: ClassVar[bool] = True

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        return tiny.llava_next(config)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a `LlavaNextForConditionalGeneration`."""
        from transformers import LlavaNextForConditionalGeneration

        return isinstance(model, LlavaNextForConditionalGeneration)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Grids follow from the sizes of the images, which only the encoder method sees."""
        config: Any = self.model.config
        vision = config.vision_config
        sizes = encoded_argument(encoded, "image", "image_sizes")
        images = [
            tiled_image(
                (height, width),
                config.image_grid_pinpoints,
                tile=vision.image_size,
                side=vision.image_size // vision.patch_size,
            )
            for height, width in torch.as_tensor(sizes).tolist()
        ]
        return images_in_order(input_ids, {config.image_token_id: images})

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """The patches of the whole image, then those of its tiles that padding does not cover."""
        config: Any = self.model.config
        vision = config.vision_config
        height, width = torch.as_tensor(arguments["image_sizes"]).tolist()[number]
        side = vision.image_size // vision.patch_size
        return tiled_patches(image, (height, width), config.image_grid_pinpoints, tile=vision.image_size, side=side)

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """One for each size."""
        return len(arguments["image_sizes"])
