"""DINOv2 in transformers, with and without registers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.configs import grid_of, patch_values, read
from ...core.shape import TowerShape
from .base import TOWERS, is_a
from .projected import ProjectedTower


@TOWERS.register("dinov2")
class Dinov2Tower(ProjectedTower):
    """`Dinov2Model` and `Dinov2WithRegistersModel` of transformers: a class token, then registers, then patches."""

    has_cls = True
    blocks_path = "encoder.layer"
    merge_paths = ("norm2", "mlp")
    model_types = frozenset({"dinov2", "dinov2_with_registers"})

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: registers beside the class token, a feed-forward layer in two forms; all images of
        the configuration's size.
        """
        rows, columns = grid_of(config)
        width = read(config, "hidden_size")
        inner, gated = int(width * config.mlp_ratio), bool(config.use_swiglu_ffn)
        return TowerShape(
            layers=read(config, "num_hidden_layers"),
            hidden=width,
            intermediate=(int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner,
            patch_values=patch_values(config),
            cls_tokens=1,
            registers=getattr(config, "num_register_tokens", 0),
            gated=gated,
            crop_patches=rows * columns,
            heads=getattr(config, "num_attention_heads", None),
        )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is one of the two models."""
        return is_a(
            module,
            "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
            "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        )

    def __init__(self, module: nn.Module) -> None:
        """Binds the tower; see `Tower`."""
        self.module = module
        self.prefix = 1 + getattr(self.config, "num_register_tokens", 0)
        # transformers up to 5.17 holds the attention one level deeper, under BERT's names.
        nested = isinstance(getattr(self.part(0, "attention"), "attention", None), nn.Module)
        self.attention_path = "attention.attention" if nested else "attention"
        self.query_path, self.key_path = ("query", "key") if nested else ("q_proj", "k_proj")
        if nested:
            self.merging_reason = "this version of transformers gives its attention no mask (later ones do)"
        super().__init__(module)
