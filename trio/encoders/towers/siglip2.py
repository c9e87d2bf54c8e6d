"""SigLIP 2 of any shape (NaFlex) in transformers: images of different sizes, padded to the same number of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.configs import patch_values, read
from ...core.shape import TowerShape
from ...errors import InputError
from .base import TOWERS, Layout, is_a
from .projected import ProjectedTower

_ARGUMENTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


@TOWERS.register("siglip2")
class Siglip2Tower(ProjectedTower):
    """`Siglip2VisionModel` of transformers: no class token; what stands at padding is left out of every signal."""

    model_types = frozenset({"siglip2_vision_model"})
    merging_reason = "it pads images of different sizes, and its masks cannot follow merged tokens"

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: images of any size, without the padding, with the pooling head."""
        return TowerShape(
            layers=read(config, "num_hidden_layers"),
            hidden=read(config, "hidden_size"),
            intermediate=read(config, "intermediate_size"),
            patch_values=patch_values(config),
            pooling_head=bool(getattr(config, "vision_use_head", True)),
            heads=getattr(config, "num_attention_heads", None),
        )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a `Siglip2VisionModel`."""
        return is_a(
            module,
            "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",
            "transformers.models.siglip2.modeling_siglip2.Siglip2VisionTransformer",
        )

    def listen_layout(self, told: Callable[[Layout], None]) -> list[RemovableHandle]:
        """See `Tower.listen_layout`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            mask: torch.Tensor = given["pixel_attention_mask"]
            starts = range(0, mask.numel(), mask.shape[1])
            told(Layout(tuple((at, at + n) for at, n in zip(starts, mask.sum(1).tolist(), strict=True))))

        return [self.module.register_forward_pre_hook(before, with_kwargs=True)]

    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """See `Tower.run`."""
        return self.module(**{name: self._arguments(images)[name] for name in _ARGUMENTS})

    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Tower.grids`."""
        return [(rows, columns) for rows, columns in self._arguments(images)["spatial_shapes"].tolist()]

    def _arguments(self, images: torch.Tensor | Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(images, Mapping) or not set(_ARGUMENTS) <= images.keys():
            raise InputError(f"images: this tower takes {', '.join(_ARGUMENTS)}; give them as its processor makes them")
        return images
