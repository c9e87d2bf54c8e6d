"""timm's vision transformers: with and without a class token, with registers, fused projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.shape import TowerShape
from .base import TOWERS, Heads, Tower, is_a, pixel_grid, pixels_of
from .open_clip import bias_argument, listen_to_norms
from .weights import shape_of_weights

_KNOWN = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


@TOWERS.register("timm")
class TimmTower(Tower):
    """timm's `VisionTransformer`: ViT, DeiT, SigLIP, CLIP, DINOv2 and whatever else is one of its configurations.

    Rotary families (EVA) are classes of their own and refused.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is timm's `VisionTransformer`."""
        return is_a(module, "timm.models.vision_transformer.VisionTransformer")

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: of a module, by its weights; pooling is left out, as in `run`."""
        tower, embed = cls(config), config.patch_embed
        patches, attention = None if config.dynamic_img_size else int(embed.num_patches), tower.attention(0)
        heads = int(attention.num_heads)  # type: ignore[arg-type]  # an int attribute
        return shape_of_weights(tower, embed, "mlp", heads=heads, patches=patches)

    def __init__(self, module: nn.Module) -> None:
        """Binds the tower; see `Tower`."""
        self.prefix = int(module.num_prefix_tokens)  # type: ignore[arg-type]  # an int attribute
        self.has_cls = getattr(module, "cls_token", None) is not None
        super().__init__(module)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Tower.blocks`."""
        blocks: Any = self.module.blocks
        return blocks  # type: ignore[no-any-return]  # a Sequential

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`."""
        found = self.part(block, "attn")
        if not is_a(found, *_KNOWN):
            raise self.refuse(f"its attention is a {type(found).__name__}, where timm's Attention is known")
        found.get_submodule("q_norm"), found.get_submodule("k_norm")
        return found

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        return listen_to_norms(self.attention(block), "q_norm", "k_norm", told)

    def merge_points(self, block: int) -> tuple[nn.Module, nn.Module]:
        """See `Tower.merge_points`."""
        if not is_a(self.blocks[block], "timm.models.vision_transformer.Block"):
            self.merging_reason = f"its blocks are {type(self.blocks[block]).__name__}, where timm's Block is known"
            return super().merge_points(block)
        return self.part(block, "norm2"), self.part(block, "mlp")

    def bias_attention(self, block: int, bias: Callable[[], torch.Tensor | None]) -> list[RemovableHandle]:
        """See `Tower.bias_attention`."""
        return [bias_argument(self.attention(block), "attn_mask", lambda added: added[:, None, None], bias)]

    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """See `Tower.run`; the head is left out."""
        return self.module.forward_features(pixels_of(images))  # type: ignore[operator]  # a method

    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Tower.grids`."""
        pixels, embed = pixels_of(images), self.module.get_submodule("patch_embed")
        pixel_grid(pixels, (1, 1))  # for the shape
        rows, columns = embed.dynamic_feat_size(tuple(pixels.shape[-2:]))  # type: ignore[operator]  # a method
        return [(int(rows), int(columns))] * pixels.shape[0]
