"""InternVL (the transformers-native one): pixel-shuffled tokens, images cut into tiles of equal token count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.configs import model_shape, read
from ..core.patches import PatchMap, join
from ..core.prompts import InputsFactory
from ..core.shape import ModelShape
from ..core.tokens import ImageTokens
from ..encoders.towers.find import tower_shape
from . import tiny
from .base import ADAPTERS, PromptLayout
from .llava import LlavaAdapter
from .placeholders import runs_of_tiles
from .tiny_inputs import BREAK, END, TinyInputs, noise


@ADAPTERS.register("internvl")
class InternVLAdapter(LlavaAdapter):
    """`InternVLForConditionalGeneration`: a run of placeholders is an image (or a video's frame), tile behind tile.

    How the tiles lie on the image is known to the processor only; each is a frame of the origin with a grid of its
    own, the thumbnail last.
    """

    labels: ClassVar[Mapping[str, str]] = {"internvl": "InternVL"}
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "unknown"  # tiles
    model_types: ClassVar[frozenset[str]] = frozenset({"internvl"})

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """See `Adapter.cost_shape`: two matrices on patches shuffled together; every tile is a crop."""
        hidden, patches = read(config.text_config, "hidden_size"), round(1 / config.downsample_ratio) ** 2
        features = read(config.vision_config, "hidden_size") * patches
        tower = tower_shape(config.vision_config)
        tower = tower.model_copy(update={"crop_tokens": (tower.crop_patches or 0) // patches or None})
        return model_shape(config, projector=((features, hidden), (hidden, hidden)), tower=tower)

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        fold = max(round(1 / config.downsample_ratio), 1)
        vision = tiny.shrunk_clip_like(config.vision_config)
        if vision is not None:  # tiles of 4 x 4 tokens, each of as many patches as in the model itself
            vision |= {"image_size": [2 * tiny.SIDE * fold] * 2, "patch_size": [2, 2]}
        given = tiny.parts(config, vision)
        return None if given is None else tiny.built(config, {**given, **tiny.feature_layers(config)})

    @classmethod
    def tiny_inputs(cls, config: Any, dtype: torch.dtype = torch.float32) -> InputsFactory:
        """See `Adapter.tiny_inputs`: one to three tiles an image, one behind the other."""
        size = config.vision_config.image_size[0]
        side = int(size // config.vision_config.patch_size[0] * config.downsample_ratio)

        def tiles(number: int) -> int:
            return 1 + number % 3

        return TinyInputs(
            lambda number: [BREAK] + [config.image_token_id] * (tiles(number) * side**2) + [END],
            lambda numbers: {"pixel_values": torch.cat([noise(n, tiles(n), 3, size, size) for n in numbers]).to(dtype)},
        )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is an `InternVLForConditionalGeneration`."""
        from transformers import InternVLForConditionalGeneration

        return isinstance(model, InternVLForConditionalGeneration)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Every tile takes the same number of placeholders."""
        config: Any = self.model.config
        rows, columns = (int(patches * config.downsample_ratio) for patches in self._patches)
        tile = ImageTokens.from_grid(rows, columns, size=round(1 / config.downsample_ratio**2))
        return runs_of_tiles(input_ids, config.image_token_id, tile)

    @property
    def _patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        vision: Any = self.model.config.vision_config  # type: ignore[union-attr]  # a transformers model's config
        rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
        return int(rows), int(columns)

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """The patches that pixel shuffling puts into each token, as the model itself shuffles their numbers."""
        rows, columns = self._patches
        config: Any = self.model.config
        numbers = torch.arange(rows * columns, dtype=torch.float64).view(1, rows, columns, 1)
        shuffle: Any = self.multimodal
        tile = shuffle.pixel_shuffle(numbers, scale_factor=config.downsample_ratio)
        tile = tile.reshape(-1, tile.shape[-1]).round().long()
        one = PatchMap(tile, torch.zeros(len(tile), dtype=torch.int64), rows * columns)
        return join([one] * (image.tokens // len(tile)))

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """As many of the images as the tiles of the pixels make up."""
        shape = arguments.get("pixel_values")
        config: Any = self.model.config
        rows, columns = self._patches
        held = sum(image.tokens for image in images)
        given = held if shape is None else int(shape[0] * round(rows * columns * config.downsample_ratio**2))
        return len(images) * given // held if held else 0

    @property
    def projected_blocks(self) -> tuple[int, ...]:
        """None: the projector sees patches shuffled together."""
        return ()
