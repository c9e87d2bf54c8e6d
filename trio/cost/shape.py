"""The numbers of a model that its cost depends on, read from a config or named.

Nothing here imports torch or transformers: a config is any object with the attributes of a transformers config.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UnknownNameError, UnsupportedModelError, did_you_mean

__all__ = ["ModelShape", "TowerShape"]

Positive = Annotated[int, Field(ge=1)]


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TowerShape(_Shape):
    """A vision tower, as it is executed.

    Attributes:
        layers: encoder layers that run. All of them, also CLIP's last one, which stock models compute and never read
            when ``vision_feature_layer`` is -2.
        hidden: width.
        intermediate: width of the feed-forward layer.
        patch_values: numbers in one patch, e.g. 3 * 14 * 14 (times the frames of a temporal patch).
        cls_tokens: tokens beside the patches in the encoder's sequence (CLIP: 1).
        gated: the feed-forward layer has a gate, so three matrices in place of two.
        pooling_head: SigLIP's attention-pooling head, which runs although a language model reads no pooled output.
        crop_patches: patches of one crop where every crop has the same size (CLIP, SigLIP); None where the number of
            patches follows the picture (Qwen).
        crop_tokens: visual tokens that one crop gives; only with `crop_patches`.
        patches_per_token: patches that become one visual token; only without `crop_patches` (Qwen: 2 * 2).
        window: patches in one attention window; None where every layer attends to all patches.
        full_attention_layers: layers without windows; only with `window`.
    """

    layers: Positive
    hidden: Positive
    intermediate: Positive
    patch_values: Positive
    cls_tokens: Annotated[int, Field(ge=0)] = 0
    gated: bool = False
    pooling_head: bool = False
    crop_patches: Positive | None = None
    crop_tokens: Positive | None = None
    patches_per_token: Positive = 1
    window: Positive | None = None
    full_attention_layers: Annotated[int, Field(ge=0)] = 0

    def crops(self, tokens: int) -> tuple[int, int]:
        """(crops, patches of each) that give `tokens` visual tokens; a part of a crop is computed as a whole one."""
        if self.crop_patches is None:
            return (1, tokens * self.patches_per_token) if tokens else (0, 0)
        return math.ceil(tokens / (self.crop_tokens or self.crop_patches)), self.crop_patches


class ModelShape(_Shape):
    """A vision-language model: a Llama-like decoder, a projector, a tower.

    Attributes:
        name: a name for tables.
        source: where the numbers come from.
        layers: decoder layers.
        hidden: width of the decoder.
        intermediate: width of its gated feed-forward layer (three matrices).
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: rows of the output head.
        projector: (inputs, outputs) of each matrix that a visual token passes between tower and decoder.
        tower: the vision tower; None leaves it out of the sum (features computed elsewhere).
        dtype_bytes: bytes of one number in the KV cache (2: bfloat16 or float16).
    """

    name: str
    source: str = ""
    layers: Positive
    hidden: Positive
    intermediate: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive
    projector: tuple[tuple[Positive, Positive], ...] = ()
    tower: TowerShape | None = None
    dtype_bytes: Positive = 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the key and the value of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """A published model's shape: one of ``llava-1.5-7b``, ``llava-next-7b``, ``qwen2.5-vl-7b``.

        Raises:
            UnknownNameError: no such shape; the message lists those there are.
        """
        shape = _NAMED.get(name)
        if shape is None:
            raise UnknownNameError(
                f"no model shape is named {name!r}. {did_you_mean(name, _NAMED)}Known: {', '.join(sorted(_NAMED))}. "
                "For another model use ModelShape.from_config(model.config)."
            )
        return shape

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that `named` knows."""
        return tuple(sorted(_NAMED))

    @classmethod
    def from_config(cls, config: Any, *, dtype_bytes: int | None = None) -> ModelShape:
        """Reads the shape off a transformers config with ``text_config`` and ``vision_config``.

        Works for dense Llama-like decoders (Llama, Mistral, Qwen2, Qwen3, ...) behind a CLIP, SigLIP or Qwen2.5-VL
        tower, with LLaVA's two-layer projector or a Qwen merger.

        Args:
            config: for example ``model.config`` or ``AutoConfig.from_pretrained(...)``.
            dtype_bytes: bytes of a number in the cache; by default those of the config's dtype, 2 where it has none.

        Raises:
            UnsupportedModelError: a number is missing, or the decoder or tower is of a kind whose cost the formulas
                do not describe (mixture of experts, another tower).
        """
        name = str(getattr(config, "model_type", type(config).__name__))
        vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
        if vision is None or text is None:
            raise UnsupportedModelError(
                f"the config {type(config).__name__} has no vision_config and text_config, so it is not a "
                "vision-language model's. Pass the config of the whole model, or build a ModelShape by hand."
            )
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(text, key, None):
                raise UnsupportedModelError(
                    f"text_config of {name} has {key}={getattr(text, key)}: the cost formulas describe dense decoders "
                    "only. Build a ModelShape by hand, with the width of the experts that run for one token as "
                    "`intermediate`."
                )
        hidden, heads = _read(text, "hidden_size"), _read(text, "num_attention_heads")
        return cls(
            name=name,
            source=f"{type(config).__name__}",
            layers=_read(text, "num_hidden_layers"),
            hidden=hidden,
            intermediate=_read(text, "intermediate_size"),
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            vocab=_read(text, "vocab_size"),
            projector=_projector(config, hidden),
            tower=_tower(config),
            dtype_bytes=dtype_bytes or _dtype_bytes(config),
        )


def _read(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedModelError(
        f"{type(config).__name__} has no positive whole number {' or '.join(names)}, which the cost formulas need. "
        "Build a ModelShape by hand."
    )


def _pair(value: Any) -> tuple[int, int]:
    """A size that configs give as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _dtype_bytes(config: Any) -> int:
    dtype = str(getattr(config, "dtype", None) or getattr(config.text_config, "dtype", None)).removeprefix("torch.")
    return {"float32": 4, "float64": 8}.get(dtype, 2)


def _projector(config: Any, hidden: int) -> tuple[tuple[int, int], ...]:
    vision = config.vision_config
    if (merge := getattr(vision, "spatial_merge_size", None)) is not None:
        merged = _read(vision, "hidden_size") * merge * merge
        return ((merged, merged), (merged, getattr(vision, "out_hidden_size", hidden)))
    features = getattr(config, "vision_feature_layer", -1)
    count = 1 if isinstance(features, int) else len(features)
    return ((_read(vision, "hidden_size") * count, hidden), (hidden, hidden))


def _tower(config: Any) -> TowerShape:
    vision = config.vision_config
    kind = str(getattr(vision, "model_type", ""))
    common: dict[str, Any] = {
        "layers": _read(vision, "num_hidden_layers", "depth"),
        "hidden": _read(vision, "hidden_size"),
        "intermediate": _read(vision, "intermediate_size"),
    }
    channels = _read(vision, "num_channels", "in_channels")
    height, width = _pair(vision.patch_size)
    values = channels * height * width
    if kind in ("clip_vision_model", "siglip_vision_model"):
        rows, columns = (side // patch for side, patch in zip(_pair(vision.image_size), (height, width), strict=True))
        clip = kind.startswith("clip")
        whole = getattr(config, "vision_feature_select_strategy", "full") == "full"  # "default" leaves the first out
        return TowerShape(
            **common,
            patch_values=values,
            cls_tokens=int(clip),
            pooling_head=not clip and bool(getattr(vision, "vision_use_head", True)),
            crop_patches=rows * columns,
            crop_tokens=rows * columns + int(clip) - int(not whole),
        )
    if kind.startswith("qwen2_5_vl"):
        full = tuple(vision.fullatt_block_indexes)
        return TowerShape(
            **common,
            patch_values=values * _pair(vision.temporal_patch_size)[0],
            gated=True,
            patches_per_token=vision.spatial_merge_size**2,
            window=(vision.window_size // height) * (vision.window_size // width),
            full_attention_layers=sum(0 <= index < common["layers"] for index in full),
        )
    raise UnsupportedModelError(
        f"the vision tower {kind or type(vision).__name__!r} is not one that the cost formulas describe (CLIP, SigLIP, "
        "Qwen2.5-VL). Build a ModelShape by hand; `tower=None` leaves the tower out."
    )


_CLIP_L_336 = TowerShape(
    layers=24, hidden=1024, intermediate=4096, patch_values=3 * 14 * 14, cls_tokens=1, crop_patches=576, crop_tokens=576
)

_NAMED = {
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
            tower=_CLIP_L_336,
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
            tower=_CLIP_L_336,
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
            ),
        ),
    )
}
