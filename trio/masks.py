"""Attention masks for layers whose caches hold different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch


class _Lengths:
    """What transformers' mask functions ask of a cache, for one layer whose real length is known."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, past: int) -> None:
        self._past = past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0


def causal_mask(
    config: Any,
    hidden: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    past: int,
    layer: int,
    window: int | None = None,
) -> Any:
    """The mask of a decoder layer in the form that the model's attention backend takes.

    Built by transformers' own mask functions: 4-D for eager and sdpa, a block mask for flex_attention, 2-D or None for
    flash-attention.

    Args:
        config: of the language model; its attention implementation decides the form.
        hidden: ``(B, S, D)``, the new tokens.
        valid: bool ``(B, past + S)``, None where no token is padding.
        past: tokens that the layer's cache really holds.
        layer: index of the layer.
        window: sliding window of the layer in tokens, None for full attention.
    """
    from transformers import masking_utils

    view: Any = _Lengths(past)
    more: dict[str, Any] = {}
    if window is not None:
        more["and_mask_function"] = masking_utils.sliding_window_overlay(window)
    return masking_utils.create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        past_key_values=view,
        position_ids=None,
        layer_idx=layer,
        **more,
    )
