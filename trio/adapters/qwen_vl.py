"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: dynamic resolution, merged patches, positions with time, row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.configs import model_shape, read
from ..core.patches import PatchMap
from ..core.shape import ModelShape
from ..core.tokens import ImageTokens
from ..encoders.towers.find import tower_shape
from ..errors import UnsupportedModelError
from . import tiny
from .base import ADAPTERS, Adapter, Positions, PromptLayout
from .placeholders import encoded_argument, images_in_order


@ADAPTERS.register("qwen-vl", aliases=("qwen2-vl", "qwen2.5-vl"))
class QwenVLAdapter(Adapter):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`, with images and videos.

    Survivors keep their own positions, as the released TRIO code for Qwen does: a position tells time, row and column,
    and renumbering would move tokens on the image. A video's tokens carry their frame.
    """

    labels: ClassVar[Mapping[str, str]] = {"qwen2-vl": "Qwen2-VL", "qwen2.5-vl": "Qwen2.5-VL"}
    default_positions: ClassVar[Positions] = "original"
    allowed_positions: ClassVar[frozenset[Positions]] = frozenset({"original"})
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "by-size"
    vision_tower_path: ClassVar[str] = "model.visual"
    projector_path: ClassVar[str] = "model.visual.merger"

    model_types: ClassVar[frozenset[str]] = frozenset({"qwen2_vl", "qwen2_5_vl"})

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """See `Adapter.cost_shape`: a merger on neighbouring patches, and one more for each of DeepStack's layers."""
        vision, tower = config.vision_config, tower_shape(config.vision_config)
        merged = tower.hidden * tower.patches_per_token
        merger = ((merged, merged), (merged, read(config.text_config, "hidden_size")))
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return model_shape(config, projector=merger * mergers, tower=tower)

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        return tiny.qwen_vl(config)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a Qwen2-VL or Qwen2.5-VL."""
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

        return isinstance(model, (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration))

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Grids come with the pixels: time, height and width in patches, which only the encoders see."""
        config: Any = self.model.config
        streams = {
            token: self._images(encoded_argument(encoded, modality, grid))
            for modality, grid, token in (
                ("image", "image_grid_thw", config.image_token_id),
                ("video", "video_grid_thw", config.video_token_id),
            )
            if modality in encoded
        }
        return images_in_order(input_ids, streams, {config.image_token_id: "image", config.video_token_id: "video"})

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """Merged patches are neighbours in the tower's order; each frame is an input of its own."""
        merge = int(self.vision_tower.spatial_merge_size)  # type: ignore[arg-type]  # nn.Module attribute
        return PatchMap.runs(image.tokens, patches=merge**2, inputs=int(image.frame.max()) + 1)

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """One for each grid."""
        return len(arguments["image_grid_thw" if "image_grid_thw" in arguments else "video_grid_thw"])

    def _images(self, grids: Any) -> list[ImageTokens]:
        merge = int(self.vision_tower.spatial_merge_size)  # type: ignore[arg-type]  # nn.Module attribute
        return [
            ImageTokens.from_grid(height // merge, width // merge, frames=frames, size=merge**2)
            for frames, height, width in torch.as_tensor(grids).tolist()
        ]

    def _check_positions(self, length: int, device: torch.device) -> torch.Tensor:
        return super()._check_positions(length, device).expand(3, 1, -1)


@ADAPTERS.register("qwen3-vl")
class Qwen3VLAdapter(QwenVLAdapter):
    """`Qwen3VLForConditionalGeneration` (dense): DeepStack adds visual features behind the first decoder layers."""

    labels: ClassVar[Mapping[str, str]] = {"qwen3-vl": "Qwen3-VL"}
    model_types: ClassVar[frozenset[str]] = frozenset({"qwen3_vl"})

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a dense Qwen3-VL."""
        from transformers import Qwen3VLForConditionalGeneration

        return isinstance(model, Qwen3VLForConditionalGeneration)

    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None:
        """DeepStack's features of layers behind the first stage: the model would add them to all visual tokens."""
        features = arguments.get("deepstack_visual_embeds")
        if not features or len(features) <= after_layer:
            return None
        if len(features) >= len(self.layers):
            raise UnsupportedModelError(
                f"DeepStack: found features for {len(features)} layers of {len(self.layers)}; the last layer's would "
                f"come behind all hooks: put the first stage after layer {len(features)} or later"
            )
        stock = list(features[:after_layer])
        kept = {**arguments, "deepstack_visual_embeds": stock or None}
        return kept, {index + 1: features[index] for index in range(after_layer, len(features))}
