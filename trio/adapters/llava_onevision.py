"""LLaVA-OneVision: one image in tiles, several images without, and video frames with pooled tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.patches import PatchMap
from ..core.tokens import NEWLINE, ImageTokens
from . import tiny
from .base import ADAPTERS, PromptLayout
from .llava import LlavaAdapter
from .placeholders import encoded_argument, images_in_order
from .tiles import tiled_image, tiled_patches


@ADAPTERS.register("llava-onevision")
class LlavaOnevisionAdapter(LlavaAdapter):
    """`LlavaOnevisionForConditionalGeneration`, with images, several images and videos.

    A video is one image whose frames share a grid half as fine as an image's; one newline token ends it.
    """

    labels: ClassVar[Mapping[str, str]] = {"llava-onevision": "LLaVA-OneVision"}
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "unknown"  # tiles
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")

    model_types: ClassVar[frozenset[str]] = frozenset({"llava_onevision"})
    whole_beside_tiles: ClassVar[bool] = True

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        return tiny.llava_onevision(config)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a `LlavaOnevisionForConditionalGeneration`."""
        from transformers import LlavaOnevisionForConditionalGeneration

        return isinstance(model, LlavaOnevisionForConditionalGeneration)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Grids follow from the sizes of the images and the number of frames, which only the encoders see."""
        config: Any = self.model.config
        streams: dict[int, list[ImageTokens]] = {}
        if "image" in encoded:
            streams[config.image_token_id] = self._images(encoded)
        if "video" in encoded:
            # transformers calls the argument pixel_values up to 5.17.
            name = "pixel_values" if "pixel_values" in encoded["video"] else "pixel_values_videos"
            count, frames = encoded_argument(encoded, "video", name)[:2]
            streams[config.video_token_id] = [self._video(frames)] * count
        return images_in_order(input_ids, streams, {config.image_token_id: "image", config.video_token_id: "video"})

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """An image's patches as for LLaVA-NeXT; a video's tokens each cover four patches of their frame."""
        config: Any = self.model.config
        side = self._side
        if "image_sizes" not in arguments:
            frames = int(image.frame.max()) + 1
            pooled = math.ceil(side / 2)
            row, column = (
                (2 * axis[:, None] + torch.tensor(offsets)).clamp_max(side - 1)
                for axis, offsets in ((image.row, [0, 0, 1, 1]), (image.column, [0, 1, 0, 1]))
            )
            assert image.tokens == frames * pooled**2
            return PatchMap(image.frame[:, None] * side**2 + row * side + column, image.frame, frames * side**2)
        if image.grids == ((side, side),):
            return PatchMap.runs(side**2)
        height, width = torch.as_tensor(arguments["image_sizes"]).tolist()[number]
        tile = config.vision_config.image_size
        return tiled_patches(image, (height, width), config.image_grid_pinpoints, tile=tile, side=side)

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """One for each size, or each video of the pixels."""
        if "image_sizes" in arguments:
            return len(arguments["image_sizes"])
        return int(arguments["pixel_values" if "pixel_values" in arguments else "pixel_values_videos"][0])

    @property
    def projected_blocks(self) -> tuple[int, ...]:
        """None: grids are shrunk and frames pooled behind the projector."""
        return ()

    @property
    def _side(self) -> int:
        config: Any = self.model.config
        return int(config.vision_config.image_size // config.vision_config.patch_size)

    def _images(self, encoded: Mapping[str, Mapping[str, Any]]) -> list[ImageTokens]:
        config: Any = self.model.config
        sizes = torch.as_tensor(encoded_argument(encoded, "image", "image_sizes")).tolist()
        numbers = encoded["image"].get("batch_num_images")
        counts = [1] * len(sizes) if numbers is None else torch.as_tensor(numbers).tolist()
        alone = [count == 1 for count in counts for _ in range(count)]  # several images of a sample are not tiled
        aspect = encoded["image"].get("vision_aspect_ratio") or config.vision_aspect_ratio
        single = ImageTokens.join([_row_of_newline(ImageTokens.from_grid(self._side, self._side))])
        return [
            tiled_image(
                (height, width),
                config.image_grid_pinpoints,
                tile=config.vision_config.image_size,
                side=self._side,
                most_tiles=int(str(aspect).removeprefix("anyres_max_")),
            )
            if tiled
            else single
            for (height, width), tiled in zip(sizes, alone, strict=True)
        ]

    def _video(self, frames: int) -> ImageTokens:
        side = math.ceil(self._side / 2)
        return _row_of_newline(ImageTokens.from_grid(side, side, frames=frames, size=4))


def _row_of_newline(image: ImageTokens) -> ImageTokens:
    """An image with one newline behind its last row."""
    end = ImageTokens.from_grid(1, 1)
    last_row = image.row[-1:]
    return ImageTokens(
        torch.cat([image.kind, torch.full_like(end.kind, NEWLINE)]),
        torch.cat([image.frame, image.frame[-1:]]),
        torch.cat([image.row, last_row]),
        torch.cat([image.column, image.column[-1:] + 1]),
        torch.cat([image.size, torch.zeros_like(end.size)]),
        image.grids,
    )
