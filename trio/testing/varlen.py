"""A stand-in for flash-attention: its calling convention, computed with plain torch.

Flash-attention takes no attention matrix. It is handed a 2-D mask of the keys, or nothing where no key is padding, cuts
the padding out, and lines the last query up with the last key. Where there is no mask, position ids with gaps make it
believe that several sequences are packed into one. The stand-in computes what flash-attention would, and refuses to be
called in a way that flash-attention would misread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: The name under which the stand-in is registered while it is in use. It must not contain "flash": transformers would
#: look for the package.
NAME = "trio-varlen-stand-in"


@contextmanager
def registered() -> Iterator[str]:
    """Registers the stand-in with transformers for the block and gives its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables: tuple[Any, ...] = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    if NAME in tables[0]:  # within another such block, which will take it out
        yield NAME
        return
    for table, function in zip(tables, (attention, flash_attention_mask), strict=True):
        type(table).register(NAME, function)
    try:
        yield NAME
    finally:
        for table in tables:
            table._global_mapping.pop(NAME, None)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as flash-attention computes it.

    Args:
        module: the attention module; its `is_causal` holds where the argument is None.
        query: ``(B, heads, Q, head dim)``.
        key: ``(B, key-value heads, K, head dim)``.
        value: the same shape.
        attention_mask: ``(B, K)``, True at keys that are not padding, or None.
        scaling: factor on the scores.
        sliding_window: how many keys a query sees, itself included; None for all.
        is_causal: whether queries see no later keys.
        position_ids: only looked at to see whether they would read as packed sequences.

    Returns:
        ``(B, Q, heads, head dim)`` and None in place of the weights. Queries that are padding give zeros.

    Raises:
        AssertionError: flash-attention would misread the call.
    """
    batch, heads, queries, _size = query.shape
    keys = key.shape[2]
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.ndim == 4 and not causal:
        # Some towers (Pixtral's) hand every implementation their own mask over packed images: theirs to answer for.
        return _plain(query, key, value, attention_mask, scaling), None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise AssertionError(
                f"flash convention: handed a mask of {attention_mask.ndim} dimensions {tuple(attention_mask.shape)}; "
                "it takes a (batch, keys) mask or none"
            )
        if attention_mask.shape != (batch, keys):
            raise AssertionError(
                f"flash convention: handed a mask of shape {tuple(attention_mask.shape)} for {batch} samples with "
                f"{keys} keys each; it would cut out the wrong keys"
            )
    elif _packed(position_ids, batch):
        raise AssertionError(
            "flash convention: position ids with gaps and no mask: they would read as several packed sequences"
        )
    valid = torch.ones(batch, keys, dtype=torch.bool, device=key.device)
    if attention_mask is not None:
        valid = attention_mask.bool()
    asking = torch.ones(batch, queries, dtype=torch.bool, device=key.device)
    if queries > 1:  # a single query is never padding, whatever the side
        asking = valid[:, keys - queries :]
    seen = valid[:, None, :].expand(batch, queries, keys)
    if causal:
        # What is not padding is lined up at the end: the last query with the last key.
        key_rank = valid.sum(1, keepdim=True) - valid.cumsum(1)
        query_rank = asking.sum(1, keepdim=True) - asking.cumsum(1)
        behind = key_rank[:, None, :] - query_rank[:, :, None]
        seen = seen & (behind >= 0)
        if sliding_window is not None:
            seen = seen & (behind < sliding_window)
    groups = heads // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float() * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    out = weights.to(value.dtype) @ value.repeat_interleave(groups, 1)
    return out.masked_fill(~asking[:, None, :, None], 0.0).transpose(1, 2).contiguous(), None


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention with a prepared 4-D mask, boolean or additive: ``(B, Q, heads, head dim)``."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out: torch.Tensor = scores.softmax(-1).to(value.dtype) @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous()


def _packed(position_ids: torch.Tensor | None, batch: int) -> bool:
    """Whether flash-attention's wrapper takes position ids for several sequences in one row."""
    if position_ids is None or batch != 1 or position_ids.shape[-1] == 1:
        return False
    straight = torch.arange(position_ids.shape[-1], device=position_ids.device) + position_ids.min()
    return bool((straight != position_ids).any())
