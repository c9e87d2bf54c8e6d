"""SigLIP's vision tower in transformers (also that of SigLIP 2 with fixed sizes): no class token."""

from __future__ import annotations

from torch import nn

from .base import TOWERS, is_a
from .projected import ProjectedTower


@TOWERS.register("siglip")
class SiglipTower(ProjectedTower):
    """`SiglipVisionModel` of transformers: the tower of LLaVA-OneVision and PaliGemma; no class token."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a `SiglipVisionModel`."""
        return is_a(
            module,
            "transformers.models.siglip.modeling_siglip.SiglipVisionModel",
            "transformers.models.siglip.modeling_siglip.SiglipVisionTransformer",
        )
