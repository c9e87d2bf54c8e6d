"""InternVL's vision tower in transformers: a class token, scaled residuals, sometimes norms on queries and keys."""

from __future__ import annotations

from torch import nn

from .base import TOWERS, is_a
from .projected import ProjectedTower


@TOWERS.register("internvl")
class InternVLTower(ProjectedTower):
    """`InternVLVisionModel` of transformers; queries and keys are read after their norms, as they meet."""

    has_cls = True
    prefix = 1
    blocks_path = "encoder.layer"
    attention_path = "attention"
    query_path = "q_norm"
    key_path = "k_norm"
    merge_paths = ("layernorm_after", "mlp")
    model_types = frozenset({"internvl_vision"})

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is an `InternVLVisionModel`."""
        return is_a(module, "transformers.models.internvl.modeling_internvl.InternVLVisionModel")
