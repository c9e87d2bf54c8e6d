"""Tiny models with random weights, built from configurations alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 99
VOCABULARY = 100
GRID = 4  # 16 visual tokens an image

Text = Literal["llama", "mistral", "qwen2", "qwen3"]
Tower = Literal["clip", "siglip"]


def text_config(kind: Text, layers: int = 6, **more: Any) -> PretrainedConfig:
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if kind == "mistral":
        given["sliding_window"] = None
    if kind == "qwen3":
        given["head_dim"] = 8
    return classes[kind](**{**given, **more})


def vision_config(kind: Tower) -> PretrainedConfig:
    classes = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    return classes[kind](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=GRID * 4,
        patch_size=4,
    )


def llava(
    text: Text = "llama",
    tower: Tower = "clip",
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    **more: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of a few thousand parameters; weights are scaled up so that attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        text_config=text_config(text, **more),
        vision_config=vision_config(tower),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_feature_layer=-2,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


Prompt = list[int | str]


def inputs(
    prompts: list[Prompt],
    *,
    side: Literal["left", "right"] = "left",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch from prompts whose entries are token ids and "image"; each image of a batch is its own.

    An image is drawn from its prompt's place and its own place within it, through `seed`, so that `single` can draw
    the same one alone.
    """
    rows, pixels = [], []
    for place, prompt in enumerate(prompts):
        row: list[int] = []
        for entry in prompt:
            if entry == "image":
                generator = torch.Generator().manual_seed(seed * 1000 + place * 10 + len(row))
                pixels.append(torch.randn(3, GRID * 4, GRID * 4, generator=generator))
                row += [IMAGE_TOKEN] * GRID**2
            else:
                row.append(int(entry))
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        batch["pixel_values"] = torch.stack(pixels).to(dtype)
    return batch


def single(
    prompts: list[Prompt], place: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """One prompt of a batch alone, with the same images."""
    alone = inputs([[] for _ in range(place)] + [prompts[place]], dtype=dtype, seed=seed)
    return {name: value[-1:] if name != "pixel_values" else value for name, value in alone.items()}
