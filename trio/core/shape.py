"""The numbers of a model that its cost depends on."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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
        cls_tokens: class tokens in the encoder's sequence (CLIP: 1).
        registers: other tokens beside the patches.
        gated: the feed-forward layer has a gate, so three matrices in place of two.
        pooling_head: SigLIP's attention-pooling head, which runs although a language model reads no pooled output.
        crop_patches: patches of one crop where every crop has the same size (CLIP, SigLIP); None where the number of
            patches follows the image (Qwen).
        crop_tokens: visual tokens that one crop gives; only with `crop_patches`.
        patches_per_token: patches that become one visual token; only without `crop_patches` (Qwen: 2 * 2).
        window: patches in one attention window; None where every layer attends to all patches.
        full_attention_layers: layers without windows; only with `window`.
        heads: attention heads of a layer; None: not known, so that what compares keys by head is not counted.
    """

    layers: Positive
    hidden: Positive
    intermediate: Positive
    patch_values: Positive
    cls_tokens: Annotated[int, Field(ge=0)] = 0
    registers: Annotated[int, Field(ge=0)] = 0
    gated: bool = False
    pooling_head: bool = False
    crop_patches: Positive | None = None
    crop_tokens: Positive | None = None
    patches_per_token: Positive = 1
    window: Positive | None = None
    full_attention_layers: Annotated[int, Field(ge=0)] = 0
    heads: Positive | None = None

    @property
    def prefix(self) -> int:
        """Rows of each crop that are no patches."""
        return self.cls_tokens + self.registers

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
