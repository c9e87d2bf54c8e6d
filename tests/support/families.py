"""One tiny random model of each family, with inputs whose pictures differ in size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from support.models import IMAGE_TOKEN, VOCABULARY, text_config, vision_config
from trio.adapters.tiles import best_resolution, tiled_image
from trio.testing.inputs import Inputs, Prompt, Side

VIDEO_TOKEN = 98
START, END = 96, 97
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
SIZES = [(16, 16), (20, 36), (40, 17), (30, 30), (9, 40)]  # height, width, by number of the picture
TILE, PATCH = 16, 4
SIDE = TILE // PATCH


def finish(model: nn.Module, dtype: torch.dtype, attention: str) -> Any:
    """Weights scaled up, so that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def words(text: str) -> list[int]:
    return [2 + zlib.crc32(word.encode()) % 90 for word in text.split()]


def noise(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def size_of(number: int) -> tuple[int, int]:
    return SIZES[number % len(SIZES)]


def padded(rows: list[list[int]], side: Side) -> Inputs:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Factory:
    """An inputs factory (`trio.testing.InputsFactory`) from what one picture of the family is."""

    tokens: Callable[[int], list[int]]
    collate: Callable[[list[int]], Inputs]
    finish: Callable[[Inputs], Inputs] = lambda batch: batch

    def __call__(self, prompts: Sequence[Prompt], *, side: Side = "left") -> Inputs:
        rows = [
            [1] + [t for part in prompt.parts for t in (self.tokens(part) if isinstance(part, int) else words(part))]
            for prompt in prompts
        ]
        pictures = [number for prompt in prompts for number in prompt.pictures]
        return self.finish({**padded(rows, side), **(self.collate(pictures) if pictures else {})})


def stacked(pictures: list[torch.Tensor]) -> torch.Tensor:
    most = max(len(picture) for picture in pictures)
    return torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pictures])


def tiles_of(number: int) -> int:
    height, width = best_resolution(size_of(number), PINPOINTS)
    return 1 + height // TILE * (width // TILE)


def llava(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.LlavaConfig(
        text_config=text_config("llama"), vision_config=vision_config("clip"), image_token_id=IMAGE_TOKEN
    )
    model = transformers.LlavaForConditionalGeneration(config)
    factory = Factory(
        lambda number: [IMAGE_TOKEN] * SIDE**2,
        lambda numbers: {"pixel_values": torch.stack([noise(n, 3, TILE, TILE) for n in numbers]).to(dtype)},
    )
    return finish(model, dtype, attention), factory


def llava_next(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.LlavaNextConfig(
        text_config=text_config("mistral"),
        vision_config=vision_config("clip"),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=IMAGE_TOKEN,
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    factory = Factory(
        lambda number: [IMAGE_TOKEN] * tiled_image(size_of(number), PINPOINTS, tile=TILE, side=SIDE).tokens,
        lambda numbers: {
            "pixel_values": stacked([noise(n, tiles_of(n), 3, TILE, TILE) for n in numbers]).to(dtype),
            "image_sizes": torch.tensor([size_of(n) for n in numbers]),
        },
    )
    return finish(model, dtype, attention), factory


def llava_onevision(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.LlavaOnevisionConfig(
        text_config=text_config("qwen2"),
        vision_config=vision_config("siglip"),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)

    def image(number: int) -> int:
        return tiled_image(size_of(number), PINPOINTS, tile=TILE, side=SIDE, most_tiles=2).tokens

    factory = Factory(
        lambda number: [IMAGE_TOKEN] * image(number),
        lambda numbers: {
            "pixel_values": stacked([noise(n, tiles_of(n), 3, TILE, TILE) for n in numbers]).to(dtype),
            "image_sizes": torch.tensor([size_of(n) for n in numbers]),
        },
    )
    return finish(model, dtype, attention), factory


def internvl(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.InternVLConfig(
        text_config=text_config("qwen2"),
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[TILE, TILE],
            patch_size=[PATCH // 2, PATCH // 2],
        ),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=SIDE**2,
        downsample_ratio=0.5,
    )
    model = transformers.InternVLForConditionalGeneration(config)

    def tiles(number: int) -> int:
        return 1 + number % 3

    factory = Factory(
        lambda number: [START] + [IMAGE_TOKEN] * (tiles(number) * SIDE**2) + [END],
        lambda numbers: {
            "pixel_values": torch.cat([noise(n, tiles(n), 3, TILE, TILE) for n in numbers]).to(dtype),
        },
    )
    return finish(model, dtype, attention), factory


def grid_of(number: int) -> tuple[int, int, int]:
    height, width = size_of(number)
    return 1, max(height // 8, 2) * 2, max(width // 8, 2) * 2


def qwen_inputs(dtype: torch.dtype) -> Factory:
    def finish_(batch: Inputs) -> Inputs:
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}

    def tokens(number: int) -> list[int]:
        _, height, width = grid_of(number)
        return [START] + [IMAGE_TOKEN] * (height * width // 4) + [END]

    def collate(numbers: list[int]) -> Inputs:
        grids = torch.tensor([grid_of(n) for n in numbers])
        pixels = [noise(n, int(grid.prod()), 3 * 2 * PATCH**2) for n, grid in zip(numbers, grids, strict=True)]
        return {"pixel_values": torch.cat(pixels).to(dtype), "image_grid_thw": grids}

    return Factory(tokens, collate, finish_)


QWEN_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def rope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section}


def qwen2_vl(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.Qwen2VLConfig(
        text_config={**QWEN_TEXT, "rope_parameters": rope([2, 1, 1])},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": PATCH,
            "mlp_ratio": 2,
        },
        **QWEN_TOKENS,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return finish(model, dtype, attention), qwen_inputs(dtype)


def qwen2_5_vl(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**QWEN_TEXT, "rope_parameters": rope([2, 1, 1])},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return finish(model, dtype, attention), qwen_inputs(dtype)


def qwen3_vl(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.Qwen3VLConfig(
        text_config={**QWEN_TEXT, "head_dim": 8, "rope_parameters": rope([2, 1, 1])},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        **QWEN_TOKENS,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    return finish(model, dtype, attention), qwen_inputs(dtype)


def smolvlm(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.SmolVLMConfig(
        text_config=text_config("llama"),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH // 2,
        },
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )
    model = transformers.SmolVLMForConditionalGeneration(config)

    def collate(numbers: list[int]) -> Inputs:
        return {"pixel_values": torch.stack([noise(n, 1, 3, TILE, TILE) for n in numbers]).to(dtype)}

    def by_sample(batch: Inputs) -> Inputs:
        """Pixels are laid out by sample; samples with fewer pictures are filled with zeros."""
        if "pixel_values" not in batch:
            return batch
        counts = ((batch["input_ids"] == IMAGE_TOKEN).sum(1) // SIDE**2).tolist()
        rows = [torch.cat([chunk[:, 0]]) for chunk in batch["pixel_values"].split(counts)]
        return {**batch, "pixel_values": stacked(rows)}

    return finish(model, dtype, attention), Factory(
        lambda n: [START, *[IMAGE_TOKEN] * SIDE**2, END], collate, by_sample
    )


def mistral3(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.Mistral3Config(
        text_config=text_config("mistral"),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=8,
            image_size=64,
            patch_size=PATCH,
        ),
        image_token_id=IMAGE_TOKEN,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    model = transformers.Mistral3ForConditionalGeneration(config)

    def size(number: int) -> tuple[int, int]:
        return 16 + 8 * (number % 2), 16 + 8 * (number % 3)

    def tokens(number: int) -> list[int]:
        height, width = (side // (2 * PATCH) for side in size(number))
        return [t for row in range(height) for t in [IMAGE_TOKEN] * width + [START if row + 1 < height else END]]

    def collate(numbers: list[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), 3, 32, 32)
        for place, number in enumerate(numbers):
            height, width = size(number)
            pixels[place, :, :height, :width] = noise(number, 3, height, width)
        return {"pixel_values": pixels.to(dtype), "image_sizes": torch.tensor([size(n) for n in numbers])}

    return finish(model, dtype, attention), Factory(tokens, collate)


def glm4v(dtype: torch.dtype, attention: str) -> tuple[Any, Factory]:
    config = transformers.Glm4vConfig(
        text_config={
            **QWEN_TEXT,
            "rope_parameters": {**rope([1, 1, 2]), "partial_rotary_factor": 1.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": PATCH,
            "image_size": TILE,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=94,
        video_end_token_id=95,
    )
    model = transformers.Glm4vForConditionalGeneration(config)
    return finish(model, dtype, attention), qwen_inputs(dtype)


FAMILIES: dict[str, Callable[[torch.dtype, str], tuple[Any, Factory]]] = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "mistral3": mistral3,
    "glm4v": glm4v,
}


def family(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> tuple[Any, Factory]:
    """A tiny random model of a family, and what makes inputs for it."""
    torch.manual_seed(seed)
    model, factory = FAMILIES[name](dtype, attention)
    # A random model would write placeholders, which stand for pictures that are not there.
    model.generation_config.suppress_tokens = [VIDEO_TOKEN, IMAGE_TOKEN, START, END]
    return model, factory
