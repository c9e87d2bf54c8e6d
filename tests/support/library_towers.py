"""Tiny random towers of open_clip and timm, as their own `create_model` builds them, and their whole attention."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import nn

from support.towers import finish
from trio.encoders.towers import tower_for
from trio.encoders.towers.base import hidden_of

SIDE = 32


def _open_clip(name: str, **vision: Any) -> Callable[[], Any]:
    """A model by `open_clip.create_model`, from a configuration of our own."""
    coca = vision.pop("coca", False)
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "patch_size": 4, "width": 32, "layers": 4, "head_width": 8, **vision},
        "text_cfg": {**text, **({"embed_cls": True, "output_tokens": True} if coca else {})},
    }
    if coca:
        config["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 50}
        config["vision_cfg"]["output_tokens"] = True
    if coca or name.endswith("custom-text"):
        config["custom_text"] = True

    def make() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"trio-{name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder)
            torch.manual_seed(0)
            model = open_clip.create_model(f"trio-{name}")
        return _settle(model)

    return make


def _timm(name: str, **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return _settle(timm.create_model(name, img_size=SIDE, patch_size=4, **extra))

    return make


def _settle(model: nn.Module) -> Any:
    """Attention that is not uniform, residuals that are not scaled to nothing."""
    model = finish(model, "", 1.5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("ls1.gamma", "ls2.gamma", "ls_1.gamma", "ls_2.gamma")):
                parameter.fill_(0.5)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "open_clip": _open_clip("plain"),
    "open_clip custom text": _open_clip("custom-text", pool_type="avg", ls_init_value=0.1),
    "open_clip attention pool": _open_clip("pool", attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2),
    "open_clip coca": _open_clip("coca", coca=True, attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2),
    "open_clip custom blocks": _open_clip("blocks", block_type="custom", qk_norm=True),
    "open_clip timm": _open_clip(
        "timm", timm_model_name="test_vit", timm_pool="token", timm_proj="linear", timm_model_pretrained=False
    ),
    "timm": _timm("test_vit"),
    "timm registers, no class token": _timm("test_vit2"),
    "timm attention pool": _timm("test_vit3"),
    "timm class token and registers": _timm("test_vit", reg_tokens=3, qk_norm=True),
    "timm no class token": _timm("test_vit", class_token=False, global_pool="avg"),
    "timm distilled": _timm("deit_tiny_distilled_patch16_224", depth=4, embed_dim=32, num_heads=4),
}


def pixels(seed: int, images: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def whole_attention(module: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention matrices ``(B, heads, S, S)`` and hidden states of each block, from the library's own naive code."""
    tower = tower_for(module)
    matrices: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    for block in tower.blocks:
        attention: Any = block.attn
        if isinstance(attention, nn.MultiheadAttention):
            attention.register_forward_hook(
                lambda module, args, out: matrices.append(
                    nn.MultiheadAttention.forward(module, *args, need_weights=True, average_attn_weights=False)[1]
                )
            )
        elif hasattr(attention, "fused_attn"):
            attention.fused_attn = False
            attention.attn_drop.register_forward_pre_hook(lambda m, args: matrices.append(args[0]))
        else:  # open_clip's own attention, whose naive branch does not run: by its definition
            held: list[torch.Tensor] = []
            attention.ln_q.register_forward_hook(lambda m, args, out, held=held: held.append(out))
            attention.ln_k.register_forward_hook(lambda m, args, out, held=held: held.append(out))
            attention.register_forward_hook(
                lambda m, args, out, held=held: matrices.append(
                    (held[0] @ held[1].transpose(-1, -2) * m.scale).softmax(-1)
                )
            )
        block.register_forward_hook(lambda m, args, out: hidden.append(hidden_of(out)))
    with torch.no_grad():
        tower.run(images)
    return matrices, hidden
