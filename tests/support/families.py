"""One tiny random model of each family, with inputs whose images differ in size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from support.models import IMAGE_TOKEN, VOCABULARY, text_config, vision_config
from trio.adapters import families
from trio.core.prompts import InputsFactory

VIDEO_TOKEN = 98
START, END = 96, 97
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
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


def llava(dtype: torch.dtype, attention: str) -> Any:
    config = transformers.LlavaConfig(
        text_config=text_config("llama"), vision_config=vision_config("clip"), image_token_id=IMAGE_TOKEN
    )
    return finish(transformers.LlavaForConditionalGeneration(config), dtype, attention)


def llava_next(dtype: torch.dtype, attention: str) -> Any:
    config = transformers.LlavaNextConfig(
        text_config=text_config("mistral"),
        vision_config=vision_config("clip"),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=IMAGE_TOKEN,
    )
    return finish(transformers.LlavaNextForConditionalGeneration(config), dtype, attention)


def llava_onevision(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.LlavaOnevisionForConditionalGeneration(config), dtype, attention)


def internvl(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.InternVLForConditionalGeneration(config), dtype, attention)


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


def qwen2_vl(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.Qwen2VLForConditionalGeneration(config), dtype, attention)


def qwen2_5_vl(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.Qwen2_5_VLForConditionalGeneration(config), dtype, attention)


def qwen3_vl(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.Qwen3VLForConditionalGeneration(config), dtype, attention)


def smolvlm(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.SmolVLMForConditionalGeneration(config), dtype, attention)


def mistral3(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.Mistral3ForConditionalGeneration(config), dtype, attention)


def glm4v(dtype: torch.dtype, attention: str) -> Any:
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
    return finish(transformers.Glm4vForConditionalGeneration(config), dtype, attention)


def vipllava(dtype: torch.dtype, attention: str) -> Any:
    config = transformers.VipLlavaConfig(
        text_config=text_config("llama"),
        vision_config=vision_config("clip"),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-2, -1],
    )
    return finish(transformers.VipLlavaForConditionalGeneration(config), dtype, attention)


def deepseek_vl(dtype: torch.dtype, attention: str) -> Any:
    config = transformers.DeepseekVLConfig(
        text_config=text_config("llama"), vision_config=vision_config("siglip"), image_token_id=IMAGE_TOKEN
    )
    return finish(transformers.DeepseekVLForConditionalGeneration(config), dtype, attention)


def janus(dtype: torch.dtype, attention: str) -> Any:
    config = transformers.JanusConfig(
        text_config=text_config("llama"),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH,
            "projection_dim": 32,
            "num_image_tokens": SIDE**2,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": VOCABULARY,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": SIDE,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE_TOKEN,
    )
    return finish(transformers.JanusForConditionalGeneration(config), dtype, attention)


FAMILIES: dict[str, Callable[[torch.dtype, str], Any]] = {
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
    "vipllava": vipllava,
    "deepseek-vl": deepseek_vl,
    "janus": janus,
}


def family(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> tuple[Any, InputsFactory]:
    """A tiny random model of a family, and what makes inputs for it."""
    torch.manual_seed(seed)
    model = FAMILIES[name](dtype, attention)
    # A random model would write placeholders, which stand for images that are not there.
    model.generation_config.suppress_tokens = [VIDEO_TOKEN, IMAGE_TOKEN, START, END]
    return model, families()[model.config.model_type].tiny_inputs(model.config, dtype)
