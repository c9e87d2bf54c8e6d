"""The formulas against `torch.utils.flop_counter` on tiny stock models, exactly, under eager attention.

Eager attention is made of matrix products, which the counter counts on every device; the fused kernels it counts on
some only. Rotary tables are a matrix product too in transformers; they are not counted as cost and taken out here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from trio.adapters.decoder_probe import RowProbe, llama_like
from trio.core.probe import LayerInputs, rows_at_end
from trio.core.upstream import Role, cache_of, keywords
from trio.cost import flops, shape_of

IMAGE_TOKEN = 90
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 6,
}
TOWERS = {"clip": lambda: CLIPVisionConfig(**VISION), "siglip": lambda: SiglipVisionConfig(**VISION)}
TEXTS = {
    "llama": lambda: LlamaConfig(**TEXT),
    "llama-mha": lambda: LlamaConfig(**{**TEXT, "num_key_value_heads": 4}),
    "qwen2": lambda: Qwen2Config(**TEXT),
    "qwen3-wide-heads": lambda: Qwen3Config(**TEXT, head_dim=16),
}


def llava(tower: str, text: str, **extra: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    if tower == "siglip":
        extra = {"vision_feature_select_strategy": "full"} | extra  # no class token to leave out
    config = LlavaConfig(
        vision_config=TOWERS[tower](), text_config=TEXTS[text](), image_token_index=IMAGE_TOKEN, **extra
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs by module name (the modules that have any), with `total` for the whole call."""
    with FlopCounterMode(display=False) as counter:
        run()
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return found | {"total": counter.get_total_flops()}


class PlainCounter(TorchDispatchMode):
    """The same counting without names of modules: their tracking does not survive `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def rotary(found: dict[str, int]) -> int:
    return sum(count for name, count in found.items() if name.endswith(".rotary_emb"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_llava_prefill_part_by_part(tower: str, text: str) -> None:
    model = llava(tower, text)
    shape = shape_of(model.config)
    ids = torch.cat([torch.full((1, 16), IMAGE_TOKEN), torch.arange(7)[None]], dim=1)
    pixels = torch.randn(1, 3, 24, 24)
    found = counted(lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1))
    name = type(model).__name__
    assert found[f"{name}.model.vision_tower"] == flops.tower_flops(shape.tower, 16)
    assert found[f"{name}.model.multi_modal_projector"] == flops.projector_flops(shape, 16)
    assert found[f"{name}.lm_head"] == flops.head_flops(shape, 1)
    language = found[f"{name}.model.language_model"] + found[f"{name}.lm_head"] - rotary(found)
    assert language == flops.prefill_flops(shape, [23] * 3)
    everything = flops.tower_flops(shape.tower, 16) + flops.projector_flops(shape, 16) + language
    assert found["total"] - rotary(found) == everything


@torch.no_grad()
def test_llava_with_several_feature_layers_and_the_class_token() -> None:
    model = llava("clip", "llama", vision_feature_layer=[-2, -1], vision_feature_select_strategy="full")
    shape = shape_of(model.config)
    ids = torch.full((1, 17), IMAGE_TOKEN)
    found = counted(lambda: model(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24), logits_to_keep=1))
    assert shape.tower is not None and shape.tower.crops(17) == (1, 16)
    total = flops.tower_flops(shape.tower, 17) + flops.projector_flops(shape, 17)
    assert found["total"] - rotary(found) == total + flops.prefill_flops(shape, [17] * 3)


@torch.no_grad()
def test_decode_steps() -> None:
    model = llava("clip", "llama")
    shape = shape_of(model.config)
    past = cache_of(model(input_ids=torch.arange(9)[None], use_cache=True))

    def two_steps() -> None:
        for token in (1, 2):
            model(input_ids=torch.tensor([[token]]), **keywords({Role.CACHE: past}), use_cache=True)

    found = counted(two_steps)
    assert found["total"] - rotary(found) == flops.decode_flops(shape, [9] * 3, 2)


@torch.no_grad()
def test_qwen_tower_with_windows_and_merger() -> None:
    torch.manual_seed(0)
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 32,
        "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text)).eval()
    model.set_attn_implementation("eager")
    shape = shape_of(model.config)
    grid = torch.tensor([[1, 8, 12]])  # whole windows of 4 x 4 patches
    pixels = torch.randn(96, 3 * 2 * 4 * 4)
    tower = model.model.visual
    found = counted(lambda: tower(pixels, grid_thw=grid))
    assert shape.tower is not None and shape.tower.window == 16
    rotations = sum(count for name, count in found.items() if name.endswith("rotary_pos_emb"))
    assert found["total"] - rotations == flops.tower_flops(shape.tower, 24) + flops.projector_flops(shape, 24)


@pytest.mark.parametrize("tokens", [11, 23, 90])
@pytest.mark.parametrize("text", TEXTS)
def test_row_probe_forward_and_backward(text: str, tokens: int) -> None:
    model = llava("clip", text)
    shape = shape_of(model.config)
    language = model.model.language_model
    hidden = torch.randn(1, tokens, 32)
    positions = torch.arange(tokens)[None]
    valid = torch.ones(1, tokens, dtype=torch.bool)
    anatomy = llama_like(language.layers[1])
    assert anatomy is not None
    anatomy = replace(anatomy, linear_values=True)
    inputs = LayerInputs(hidden, valid, language.rotary_emb(hidden, positions))
    probe = RowProbe(anatomy, inputs, lambda x, **_: model.lm_head(language.norm(x)), None)
    with PlainCounter() as saliency:
        probe.saliency(rows_at_end(valid, 4))
    assert saliency.total == flops.probe_flops(shape, tokens, 4)
    with PlainCounter() as row:
        probe.attention_rows(rows_at_end(valid, 1))
    assert row.total == flops.last_row_flops(shape, tokens)


def test_the_shape_reads_the_dtype_of_the_cache() -> None:
    model = llava("clip", "llama")
    for dtype, size in ((None, 2), (torch.float32, 4), ("float32", 4), (torch.bfloat16, 2), (torch.float16, 2)):
        model.config.dtype = dtype
        assert shape_of(model.config).dtype_bytes == size
    full = cache_of(model(input_ids=torch.arange(9)[None], use_cache=True))
    held = sum(t.numel() * t.element_size() for layer in full.layers for t in (layer.keys, layer.values))
    assert held == 9 * 3 * shape_of(model.config, dtype_bytes=4).kv_bytes_per_token
