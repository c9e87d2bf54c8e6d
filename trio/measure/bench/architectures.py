"""Published architectures as configurations of true shape, and images of noise for them: no weights, no processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters.tiles import tiled_image
from ...core.prompts import Inputs
from ...errors import InputError, UnknownNameError, did_you_mean

__all__ = ["ARCHITECTURES", "Architecture", "Size", "SizedImage", "architecture"]

#: Height and width of an image in pixels.
Size = tuple[int, int]
_TILE, _SIDE = 336, 24
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class SizedImage:
    """What an image of one size is to a model.

    Attributes:
        ids: the ids that it takes in the prompt.
        visual: tokens among them that stand for the image.
        tensors: the arguments of so many such images, float32 noise where they are pixels.
    """

    ids: list[int]
    visual: int
    tensors: Callable[[int], Inputs]


@dataclass(frozen=True)
class Architecture:
    """A published architecture.

    Attributes:
        name: what the command line calls it.
        source: where the numbers come from.
        model_type: transformers' name of the family.
        config: arguments of the configuration.
        image: an image of a size, from the whole configuration.
        sizes: sizes of images, largest first; the first is the default.
        by_depth: lists of tower layers by number, in the vision part, which shrink with the depth.
    """

    name: str
    source: str
    model_type: str
    config: Mapping[str, Any]
    image: Callable[[Any, Size], SizedImage]
    sizes: tuple[Size, ...]
    by_depth: tuple[str, ...] = ()

    def arguments(self, layers: int | None = None) -> dict[str, Any]:
        """Arguments of the configuration, with fewer decoder layers where a number is given.

        The tower is cut in the same proportion (at least 3 layers are left), so that its share of the time stays near
        that of the whole model.

        Raises:
            InputError: the model has no so many layers.
        """
        text, vision = dict(self.config["text_config"]), dict(self.config["vision_config"])
        whole, name = text["num_hidden_layers"], "depth" if "depth" in vision else "num_hidden_layers"
        if layers is not None:
            if not 1 <= layers <= whole:
                raise InputError(f"--layers {layers}: {self.name} has {whole}; give 1 to {whole}.")
            depth = vision[name]
            vision[name] = max(3, round(depth * layers / whole))
            text["num_hidden_layers"] = layers
            for key in self.by_depth:
                vision[key] = sorted({min(vision[name] - 1, index * vision[name] // depth) for index in vision[key]})
        return {**self.config, "text_config": text, "vision_config": vision}


def architecture(name: str) -> Architecture:
    """An architecture by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    found = ARCHITECTURES.get(name)
    if found is None:
        raise UnknownNameError(
            f"--arch {name!r}: no such architecture. {did_you_mean(name, ARCHITECTURES)}Known: "
            f"{', '.join(ARCHITECTURES)}. For another model give its checkpoint as MODEL."
        )
    return found


def _one_grid(config: Any, size: Size) -> SizedImage:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    shape = (3, vision.image_size, vision.image_size)
    return SizedImage(
        [config.image_token_id] * tokens, tokens, lambda count: {"pixel_values": torch.randn(count, *shape)}
    )


def _tiled(config: Any, size: Size) -> SizedImage:
    vision, points = config.vision_config, config.image_grid_pinpoints
    tile = vision.image_size
    image = tiled_image(size, points, tile=tile, side=tile // vision.patch_size, most_tiles=None)
    tiles = 1 + (size[0] // tile) * (size[1] // tile)

    def tensors(count: int) -> Inputs:
        return {
            "pixel_values": torch.randn(count, tiles, 3, tile, tile),
            "image_sizes": torch.tensor([size] * count),
        }

    return SizedImage([config.image_token_id] * image.tokens, image.tokens, tensors)


def _merged(config: Any, size: Size) -> SizedImage:
    vision = config.vision_config
    height, width = (side // vision.patch_size for side in size)
    tokens = height * width // vision.spatial_merge_size**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def tensors(count: int) -> Inputs:
        return {
            "pixel_values": torch.randn(count * height * width, values),
            "image_grid_thw": torch.tensor([[1, height, width]] * count),
        }

    ids = [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
    return SizedImage(ids, tokens, tensors)


def _squares(step: int, largest: int) -> tuple[Size, ...]:
    return tuple((side, side) for side in range(largest, step, -step))


_VICUNA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_CLIP: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": _TILE,
    "patch_size": _TILE // _SIDE,
    "projection_dim": 768,
}
_QWEN_IDS: Mapping[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}

_ALL: Sequence[Architecture] = (
    Architecture(
        name="llava-1.5-7b",
        source="llava-hf/llava-1.5-7b-hf",
        model_type="llava",
        config={"text_config": _VICUNA, "vision_config": _CLIP, "image_token_id": 32000},
        image=_one_grid,
        sizes=((_TILE, _TILE),),
    ),
    Architecture(
        name="llava-next-7b",
        source="llava-hf/llava-v1.6-vicuna-7b-hf",
        model_type="llava_next",
        config={
            "text_config": _VICUNA,
            "vision_config": _CLIP,
            "image_token_id": 32000,
            "image_grid_pinpoints": _PINPOINTS,
        },
        image=_tiled,
        sizes=((672, 672), (336, 672)),
    ),
    Architecture(
        name="qwen2.5-vl-7b",
        source="Qwen/Qwen2.5-VL-7B-Instruct",
        model_type="qwen2_5_vl",
        config={
            **_QWEN_IDS,
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128000,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                "use_sliding_window": False,
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "out_hidden_size": 3584,
                "tokens_per_second": 2,
            },
        },
        image=_merged,
        sizes=_squares(28, 1008),
        by_depth=("fullatt_block_indexes",),
    ),
    Architecture(
        name="qwen3-vl-8b",
        source="Qwen/Qwen3-VL-8B-Instruct",
        model_type="qwen3_vl",
        config={
            **_QWEN_IDS,
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
        image=_merged,
        sizes=_squares(32, 1152),
        by_depth=("deepstack_visual_indexes",),
    ),
)
#: By name.
ARCHITECTURES: Mapping[str, Architecture] = {one.name: one for one in _ALL}
