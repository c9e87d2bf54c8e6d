"""InternVL (the transformers-native one): pixel-shuffled tokens, pictures cut into tiles of equal token count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trio.adapters.base import Layout
from trio.adapters.llava import LlavaAdapter
from trio.adapters.placeholders import runs_of_tiles
from trio.origins import ImageTokens
from trio.registry import ADAPTERS


@ADAPTERS.register("internvl")
class InternVLAdapter(LlavaAdapter):
    """`InternVLForConditionalGeneration`: a run of placeholders is a picture (or a video's frame), tile behind tile.

    How the tiles lie on the picture is known to the processor only; each is a frame of the origin with a grid of its
    own, the thumbnail last.
    """

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is an `InternVLForConditionalGeneration`."""
        from transformers import InternVLForConditionalGeneration

        return isinstance(model, InternVLForConditionalGeneration)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> Layout:
        """Every tile takes the same number of placeholders."""
        config: Any = self.model.config
        rows, columns = (
            int(size // patch * config.downsample_ratio)
            for size, patch in zip(config.vision_config.image_size, config.vision_config.patch_size, strict=True)
        )
        tile = ImageTokens.from_grid(rows, columns, size=round(1 / config.downsample_ratio**2))
        return runs_of_tiles(input_ids, config.image_token_id, tile)
