"""Where shapes come from: a configuration, by the adapter of its family, or a published checkpoint, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapters.find import families
from ..core.shape import ModelShape, TowerShape
from ..errors import UnknownNameError, UnsupportedModelError, did_you_mean

__all__ = ["PUBLISHED", "published_shape", "shape_of"]


def shape_of(config: Any, *, dtype_bytes: int | None = None) -> ModelShape:
    """The shape of a model, from its configuration alone; the adapter of its family reads it (`Adapter.cost_shape`).

    Args:
        config: for example ``model.config`` or ``AutoConfig.from_pretrained(...)``.
        dtype_bytes: bytes of a number in the cache; by default those of the config's dtype, 2 where it has none.

    Raises:
        UnsupportedModelError: no adapter describes the family, a number is missing, or decoder or tower are of a kind
            that the formulas do not describe (a mixture of experts, another tower).
    """
    if getattr(config, "vision_config", None) is None or getattr(config, "text_config", None) is None:
        raise UnsupportedModelError(
            f"the config {type(config).__name__} has no vision_config and text_config, so it is not a "
            "vision-language model's. Pass the config of the whole model, or build a ModelShape by hand."
        )
    kind = str(getattr(config, "model_type", ""))
    known = families()
    if kind in known:
        shape = known[kind].cost_shape(config)
        return shape if dtype_bytes is None else ModelShape(**{**dict(shape), "dtype_bytes": dtype_bytes})
    raise UnsupportedModelError(
        f"the config {type(config).__name__} is of type {kind!r}, and no adapter says what such a model costs. "
        f"{did_you_mean(kind, known)}Known: {', '.join(sorted(known))}. Write Adapter.cost_shape for it, or build a "
        "ModelShape by hand."
    )


def published_shape(name: str) -> ModelShape:
    """A published model's shape, by one of the names of `PUBLISHED`.

    Raises:
        UnknownNameError: no such shape; the message lists those there are.
    """
    shape = PUBLISHED.get(name)
    if shape is None:
        raise UnknownNameError(
            f"no model shape is named {name!r}. {did_you_mean(name, PUBLISHED)}Known: {', '.join(sorted(PUBLISHED))}. "
            "For another model use trio.cost.shape_of(model.config)."
        )
    return shape


_VIT_L_336 = TowerShape(
    layers=24,
    hidden=1024,
    intermediate=4096,
    patch_values=3 * 14 * 14,
    cls_tokens=1,
    crop_patches=576,
    crop_tokens=576,
    heads=16,
)

PUBLISHED: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="llava-1.5-7b",
            source="llava-hf/llava-1.5-7b-hf, config.json (Vicuna-7B, CLIP ViT-L/14 at 336 px)",
            layers=32,
            hidden=4096,
            intermediate=11008,
            heads=32,
            kv_heads=32,
            head_dim=128,
            vocab=32064,
            projector=((1024, 4096), (4096, 4096)),
            tower=_VIT_L_336,
        ),
        ModelShape(
            name="llava-next-7b",
            source="llava-hf/llava-v1.6-vicuna-7b-hf, config.json (Vicuna-7B, CLIP ViT-L/14 at 336 px, up to 5 crops)",
            layers=32,
            hidden=4096,
            intermediate=11008,
            heads=32,
            kv_heads=32,
            head_dim=128,
            vocab=32064,
            projector=((1024, 4096), (4096, 4096)),
            tower=_VIT_L_336,
        ),
        ModelShape(
            name="qwen2.5-vl-7b",
            source="Qwen/Qwen2.5-VL-7B-Instruct, config.json",
            layers=28,
            hidden=3584,
            intermediate=18944,
            heads=28,
            kv_heads=4,
            head_dim=128,
            vocab=152064,
            projector=((5120, 5120), (5120, 3584)),
            tower=TowerShape(
                layers=32,
                hidden=1280,
                intermediate=3420,
                patch_values=3 * 2 * 14 * 14,
                gated=True,
                patches_per_token=4,
                window=64,
                full_attention_layers=4,
                heads=16,
            ),
        ),
    )
}
