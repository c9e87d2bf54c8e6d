"""Numbers read off a transformers configuration: any object with its attributes, nothing is imported for it."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from .shape import ModelShape, TowerShape

__all__ = ["grid_of", "model_shape", "pair", "patch_values", "read"]


def read(config: Any, *names: str) -> int:
    """The first of the attributes that is a positive whole number.

    Raises:
        UnsupportedModelError: none of them is.
    """
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedModelError(
        f"{type(config).__name__} has no positive whole number {' or '.join(names)}, which the cost formulas need. "
        "Build a ModelShape by hand."
    )


def pair(value: Any) -> tuple[int, int]:
    """A size that configurations give as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def patch_values(vision: Any) -> int:
    """Numbers in one patch of a vision tower."""
    height, width = pair(vision.patch_size)
    return read(vision, "num_channels", "in_channels") * height * width


def grid_of(vision: Any) -> tuple[int, int]:
    """Rows and columns of patches of a vision tower whose images all have the same size."""
    height, width = (
        side // patch for side, patch in zip(pair(vision.image_size), pair(vision.patch_size), strict=True)
    )
    return height, width


def model_shape(config: Any, *, projector: tuple[tuple[int, int], ...], tower: TowerShape | None) -> ModelShape:
    """The shape of a model, its decoder read off the configuration: a dense Llama-like one (Mistral, Qwen3, ...).

    Args:
        config: of the whole model, with `text_config`.
        projector: see `ModelShape`.
        tower: see `ModelShape`.

    Raises:
        UnsupportedModelError: a number is missing, or the decoder is a mixture of experts.
    """
    name, text = str(getattr(config, "model_type", type(config).__name__)), config.text_config
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(text, key, None):
            raise UnsupportedModelError(
                f"text_config of {name} has {key}={getattr(text, key)}: the cost formulas describe dense decoders "
                "only. Build a ModelShape by hand, with the width of the experts that run for one token as "
                "`intermediate`."
            )
    hidden, heads = read(text, "hidden_size"), read(text, "num_attention_heads")
    dtype = str(getattr(config, "dtype", None) or getattr(text, "dtype", None)).removeprefix("torch.")
    return ModelShape(
        name=name,
        source=type(config).__name__,
        layers=read(text, "num_hidden_layers"),
        hidden=hidden,
        intermediate=read(text, "intermediate_size"),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocab=read(text, "vocab_size"),
        projector=projector,
        tower=tower,
        dtype_bytes={"float32": 4, "float64": 8}.get(dtype, 2),
    )
