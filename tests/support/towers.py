"""One tiny random vision tower of each family in transformers, and what its eager attention says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl


@dataclass(frozen=True)
class TowerCase:
    """A tower and what is known of it.

    Attributes:
        make: the tower, for the name of an attention implementation.
        images: its arguments, from a seed.
        cls: whether it has a class token.
        prefix: rows that are no patches.
        seeing: by windowed block, the one whose attention is read in its place.
    """

    make: Callable[[str], Any]
    images: Callable[[int], Mapping[str, Any]]
    cls: bool = False
    prefix: int = 0
    seeing: Mapping[int, int] | None = None

    @property
    def packed(self) -> bool:
        """Whether the tower takes images of all sizes in one row of rows."""
        return "grid_thw" in self.images(0)

    def counts(self) -> tuple[int, ...]:
        """Patches of each input."""
        images = self.images(0)
        if self.packed:
            return tuple(rows * columns for frames, rows, columns in images["grid_thw"].tolist() for _ in range(frames))
        if "spatial_shapes" in images:
            return tuple(images["spatial_shapes"].prod(1).tolist())
        return (25,) * len(images["pixel_values"])


def finish(model: nn.Module, attention: str, scale: float = 4.0) -> Any:
    """Weights scaled up, so that attention is far from uniform; biases and class tokens are not left at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if attention:
        model.set_attn_implementation(attention)
    return model.eval()


def tower_class(name: str) -> Any:
    """A class of transformers; not all are public in all versions."""
    homes = [transformers, modeling_qwen2_vl, modeling_qwen2_5_vl]
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def _model(config: str, model: str, *, scale: float = 4.0, **extra: Any) -> Callable[[str], Any]:
    def make(attention: str) -> Any:
        torch.manual_seed(0)
        return finish(tower_class(model)(getattr(transformers, config)(**extra)), attention, scale)

    return make


VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4, "image_size": 20}
QWEN = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def pixels(seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(seed))}


def naflex(seed: int) -> dict[str, torch.Tensor]:
    """Three images of different shapes, padded to 24 patches."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor([[4, 5], [2, 7], [4, 6]])
    mask = torch.arange(24)[None] < shapes.prod(1)[:, None]
    values = torch.randn(3, 24, 48, generator=generator)
    return {"pixel_values": values, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def packed(seed: int) -> dict[str, torch.Tensor]:
    """An image, a video of two temporal frames, and an image narrower than a window."""
    grid = torch.tensor([[1, 8, 12], [2, 6, 8], [1, 2, 4]])
    rows = int(grid.prod(1).sum())
    values = torch.randn(rows, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    return {"hidden_states": values, "grid_thw": grid}


TOWERS = {
    "clip": TowerCase(_model("CLIPVisionConfig", "CLIPVisionModel", intermediate_size=48, **VIT), pixels, True, 1),
    "siglip": TowerCase(
        _model("SiglipVisionConfig", "SiglipVisionModel", scale=1.5, intermediate_size=48, **VIT), pixels
    ),
    "internvl": TowerCase(
        _model(
            "InternVLVisionConfig",
            "InternVLVisionModel",
            intermediate_size=48,
            **{**VIT, "patch_size": (4, 4), "image_size": (20, 20)},
            use_qk_norm=True,
        ),
        pixels,
        True,
        1,
    ),
    "dinov2": TowerCase(_model("Dinov2Config", "Dinov2Model", mlp_ratio=2, **VIT), pixels, True, 1),
    "dinov2-registers": TowerCase(
        _model("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=3, **VIT),
        pixels,
        True,
        4,
    ),
    "siglip2": TowerCase(
        _model(
            "Siglip2VisionConfig",
            "Siglip2VisionModel",
            scale=1.5,
            intermediate_size=48,
            num_patches=25,
            **{name: value for name, value in VIT.items() if name != "image_size"},
        ),
        naflex,
    ),
    "qwen2.5-vl": TowerCase(
        _model(
            "Qwen2_5_VLVisionConfig",
            "Qwen2_5_VisionTransformerPretrainedModel",
            **QWEN,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=24,
            fullatt_block_indexes=[1, 3],
            window_size=16,
        ),
        packed,
        seeing={0: 1, 2: 3},
    ),
    "qwen2-vl": TowerCase(
        _model(
            "Qwen2VLVisionConfig",
            "Qwen2VisionTransformerPretrainedModel",
            **QWEN,
            embed_dim=32,
            hidden_size=24,
            mlp_ratio=2,
        ),
        packed,
    ),
    "qwen3-vl": TowerCase(
        _model(
            "Qwen3VLVisionConfig",
            "Qwen3VLVisionModel",
            **QWEN,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=24,
            num_position_embeddings=25,
            deepstack_visual_indexes=[1],
        ),
        packed,
    ),
}
