"""CLIP's vision tower in transformers: a class token, learnt positions, separate projections."""

from __future__ import annotations

from torch import nn

from .base import TOWERS, is_a
from .projected import ProjectedTower


@TOWERS.register("clip")
class ClipTower(ProjectedTower):
    """`CLIPVisionModel` of transformers: the tower of LLaVA-1.5 and LLaVA-NeXT, read at its last block but one."""

    has_cls = True
    prefix = 1
    features_block = -2
    model_types = frozenset({"clip_vision_model"})

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a `CLIPVisionModel`."""
        return is_a(
            module,
            "transformers.models.clip.modeling_clip.CLIPVisionModel",
            "transformers.models.clip.modeling_clip.CLIPVisionTransformer",
        )
