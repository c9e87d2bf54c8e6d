"""Models of true shapes without weights, on the ``meta`` device, and their inputs: what `trio.testing.launches` counts.

Widths, depths and vocabularies are those of the released configurations that `trio.cost.PUBLISHED` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.upstream import MASK
from ..errors import UnknownNameError, did_you_mean

META = torch.device("meta")
#: Tokens of the question; each further sample of a batch has one more, so that it is padded.
QUESTION = 40


@dataclass(frozen=True)
class CountedArchitecture:
    """A model of true shape.

    Attributes:
        build: the model of a number of decoder layers, on the current default device.
        layers: decoder layers of the released model.
        tokens: the ids that an image takes, by the model's configuration.
        pixels: what the model gets of images besides ids, by their number: on the host.
    """

    build: Callable[[int], Any]
    layers: int
    tokens: Callable[[Any], list[int]]
    pixels: Callable[[int], Mapping[str, torch.Tensor]]


def meta_model(name: str, *, layers: int | None = None, dtype: torch.dtype = torch.float16) -> Any:
    """A model of true shape without weights, on the ``meta`` device.

    Args:
        name: one of `ARCHITECTURES`.
        layers: decoder layers; as many as the released model has, if not given.
        dtype: of the weights that are not there.

    Raises:
        UnknownNameError: no architecture has that name.
    """
    architecture = _architecture(name)
    with META:
        model = architecture.build(architecture.layers if layers is None else layers)
    return model.to(dtype).eval()


def meta_inputs(name: str, model: Any, batch: int = 1) -> dict[str, torch.Tensor]:
    """One image and a question for each sample, on the host, for `trio.testing.launches.count`.

    Args:
        name: one of `ARCHITECTURES`.
        model: as `meta_model` gives it.
        batch: samples; each has a question one token longer than the one before, padded on the left.
    """
    architecture = _architecture(name)
    image = architecture.tokens(model.config)
    length = len(image) + QUESTION + batch
    ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.zeros(batch, length, dtype=torch.int64)
    for sample in range(batch):
        row = [1, *image, *range(100, 100 + QUESTION + sample)]
        ids[sample, length - len(row) :], mask[sample, length - len(row) :] = torch.tensor(row), 1
    inputs = {"input_ids": ids, MASK: mask, **architecture.pixels(batch)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def _architecture(name: str) -> CountedArchitecture:
    if name not in ARCHITECTURES:
        raise UnknownNameError(
            f"architecture: found {name!r}. {did_you_mean(name, ARCHITECTURES)}Known are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


# LLaVA


def _vicuna(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )


def _clip_336() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def _llava(layers: int) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=_clip_336(), text_config=_vicuna(layers), image_token_index=32000)
    )


def _llava_next(layers: int) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    points = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config: Any = LlavaNextConfig(
        vision_config=_clip_336(), text_config=_vicuna(layers), image_token_index=32000, image_grid_pinpoints=points
    )
    return LlavaNextForConditionalGeneration(config)


# Qwen2.5-VL

#: Patches along the sides of the image: 1,008 pixels, 1,296 visual tokens.
QWEN_SIDE = 72


def _qwen(layers: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _qwen_tokens(config: Any) -> list[int]:
    image = [config.image_token_id] * (QWEN_SIDE**2 // config.vision_config.spatial_merge_size**2)
    return [config.vision_start_token_id, *image, config.vision_end_token_id]


#: By the names of `trio.cost.PUBLISHED`. LLaVA-NeXT's image fills its four tiles: 2,928 placeholders with newlines.
ARCHITECTURES: Mapping[str, CountedArchitecture] = {
    "llava-1.5-7b": CountedArchitecture(
        _llava,
        32,
        lambda config: [config.image_token_id] * 576,
        lambda batch: {"pixel_values": torch.zeros(batch, 3, 336, 336)},
    ),
    "llava-next-7b": CountedArchitecture(
        _llava_next,
        32,
        lambda config: [config.image_token_id] * 2928,
        lambda batch: {
            "pixel_values": torch.zeros(batch, 5, 3, 336, 336),
            "image_sizes": torch.tensor([[672, 672]] * batch),
        },
    ),
    "qwen2.5-vl-7b": CountedArchitecture(
        _qwen,
        28,
        _qwen_tokens,
        lambda batch: {
            "pixel_values": torch.zeros(batch * QWEN_SIDE**2, 3 * 2 * 14**2),
            "image_grid_thw": torch.tensor([[1, QWEN_SIDE, QWEN_SIDE]] * batch),
        },
    ),
}
