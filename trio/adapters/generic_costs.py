"""What models of the generic adapter compute, by the configuration's `model_type`: families without their own adapter.

Each function takes the configuration of a whole model and checks nothing but that its numbers are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core.configs import grid_of, model_shape, pair, patch_values, read
from ..core.shape import ModelShape, TowerShape
from ..encoders.towers.find import tower_shape


def _two_layers(config: Any) -> ModelShape:
    """ViP-LLaVA and DeepSeek-VL: two matrices, on the features of one layer of the tower or of several."""
    tower, hidden = tower_shape(config.vision_config), read(config.text_config, "hidden_size")
    chosen = getattr(config, "vision_feature_layers", getattr(config, "vision_feature_layer", -1))
    features = tower.hidden * (1 if isinstance(chosen, int) else len(chosen))
    return model_shape(config, projector=((features, hidden), (hidden, hidden)), tower=tower)


def _smolvlm(config: Any) -> ModelShape:
    """Idefics3 and SmolVLM: SigLIP's layers without its head, patches shuffled together, one matrix."""
    hidden, patches = read(config.text_config, "hidden_size"), read(config, "scale_factor") ** 2
    tower = _plain(config.vision_config, read(config.vision_config, "intermediate_size"))
    tower = tower.model_copy(update={"crop_tokens": (tower.crop_patches or 0) // patches or None})
    return model_shape(config, projector=((tower.hidden * patches, hidden),), tower=tower)


def _mistral3(config: Any) -> ModelShape:
    """Mistral 3: Pixtral's gated layers on images of any size, a matrix that merges neighbouring patches, two more."""
    vision, hidden = config.vision_config, read(config.text_config, "hidden_size")
    width, patches = read(vision, "hidden_size"), read(config, "spatial_merge_size") ** 2
    chosen = getattr(config, "vision_feature_layer", -1)
    features = width * (1 if isinstance(chosen, int) else len(chosen))
    tower = TowerShape(
        layers=read(vision, "num_hidden_layers"),
        hidden=width,
        intermediate=read(vision, "intermediate_size"),
        patch_values=patch_values(vision),
        gated=True,
        patches_per_token=patches,
    )
    return model_shape(config, projector=((width * patches, width), (features, hidden), (hidden, hidden)), tower=tower)


def _glm4v(config: Any) -> ModelShape:
    """GLM-4V: gated layers as wide as the tower's output, a convolution that merges patches, a gated merger."""
    vision = config.vision_config
    width, out, inner = (read(vision, name) for name in ("hidden_size", "out_hidden_size", "intermediate_size"))
    patches = read(vision, "spatial_merge_size") ** 2
    tower = TowerShape(
        layers=read(vision, "depth"),
        hidden=width,
        intermediate=out,
        patch_values=patch_values(vision) * pair(vision.temporal_patch_size)[0],
        gated=True,
        patches_per_token=patches,
    )
    merger = ((width * patches, out), (out, out), (out, inner), (out, inner), (inner, out))
    return model_shape(config, projector=merger, tower=tower)


def _janus(config: Any) -> ModelShape:
    """Janus: layers as SigLIP's without its head, an aligner of `depth` matrices."""
    vision = config.vision_config
    tower = _plain(vision, int(read(vision, "hidden_size") * vision.mlp_ratio))
    out = read(vision, "projection_dim")
    return model_shape(
        config, projector=((tower.hidden, out), *(((out, out),) * (read(vision, "depth") - 1))), tower=tower
    )


def _plain(vision: Any, intermediate: int) -> TowerShape:
    """Images of one size, patches alone, two matrices behind attention."""
    rows, columns = grid_of(vision)
    return TowerShape(
        layers=read(vision, "num_hidden_layers"),
        hidden=read(vision, "hidden_size"),
        intermediate=intermediate,
        patch_values=patch_values(vision),
        crop_patches=rows * columns,
    )


SHAPES: Mapping[str, Callable[[Any], ModelShape]] = {
    "deepseek_vl": _two_layers,
    "glm4v": _glm4v,
    "idefics3": _smolvlm,
    "janus": _janus,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "vipllava": _two_layers,
}
