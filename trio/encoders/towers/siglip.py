"""SigLIP's vision tower in transformers (also that of SigLIP 2 with fixed sizes): no class token."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.shape import TowerShape
from .base import TOWERS, is_a
from .projected import ProjectedTower


@TOWERS.register("siglip")
class SiglipTower(ProjectedTower):
    """`SiglipVisionModel` of transformers: the tower of LLaVA-OneVision and PaliGemma; no class token."""

    model_types = frozenset({"siglip_vision_model"})

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: with the pooling head, which runs although no language model reads it."""
        head = bool(getattr(config, "vision_use_head", True))
        return super().cost_shape(config).model_copy(update={"pooling_head": head})

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a `SiglipVisionModel`."""
        return is_a(
            module,
            "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
            "transformers.models.siglip.modeling_siglip.SiglipVisionTransformer",
        )
