"""What a model answers with some of its visual tokens gone, without the runtime: the stock model, eager, uncached.

No mask, position, cache or hook of the runtime's is used. With original positions every token stays in place, and the
dropped ones are hidden from the others (`masked_logits`). With renumbered positions the stock decoder layers are called
one by one on the tokens that are left (`compact_logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, UnsupportedModelError
from .bench import attention_of
from .stock import entering, entry, placeholders, stock_logits, valid_tokens
from .survivors import Features, kept_columns, merged_features

if TYPE_CHECKING:
    from ..adapters.base import Adapter

__all__ = ["Features", "KeptByLayer", "compact_logits", "kept_columns", "masked_logits", "merged_features"]

#: For decoder layers the columns that are there from that layer on: bool ``(B, S)``, False at padding too.
KeptByLayer = Mapping[int, torch.Tensor]


def masked_logits(
    model: nn.Module,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    kept_by_layer: KeptByLayer,
    *,
    features: Features | None = None,
) -> torch.Tensor:
    """Logits of the stock model where dropped tokens are hidden from others, each token at its own position.

    The hidden states of dropped tokens are computed, and seen by nobody. No pipeline may be attached.

    Args:
        model: the model, in evaluation mode.
        adapter: of the model; it says where the modules are and how wide the layers' sliding windows.
        inputs: what the forward takes, with `input_ids` ``(B, S)`` and, where rows are padded, a 2-D `attention_mask`.
        kept_by_layer: by decoder layer (0: the first) which columns are there from that layer on, bool ``(B, S)``; what
            is gone never comes back. `kept_columns` reads it off a report.
        features: of merged tokens; None: the stock model's own.

    Returns:
        ``(B, S, vocabulary)``; rows of dropped tokens and of padding mean nothing.

    Raises:
        InputError: `kept_by_layer` does not fit the inputs or the model, or a pipeline is attached.
        UnsupportedModelError: a decoder layer takes its mask in a form that is not known.
    """
    kept = _checked(adapter, inputs, kept_by_layer)
    later: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        if features is not None:
            averages = _averages(adapter, inputs, features, later)
            handle = adapter.language_model.register_forward_pre_hook(averages, with_kwargs=True)
            hooks.callback(handle.remove)
        for index, layer in enumerate(adapter.layers):
            here = kept.get(max((after for after in kept if after <= index), default=-1))
            masking = _masking(adapter, index, valid_tokens(inputs), here, features, later)
            hooks.callback(layer.register_forward_pre_hook(masking, with_kwargs=True).remove)
        return stock_logits(model, adapter, inputs)


def compact_logits(
    model: nn.Module,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    kept_by_layer: KeptByLayer,
    *,
    features: Features | None = None,
) -> list[torch.Tensor]:
    """Logits of the stock decoder layers on the tokens that are left, numbered from 0 without gaps after each drop.

    The layers are called one by one, each sample alone and without padding. No pipeline may be attached.

    Args:
        model: see `masked_logits`.
        adapter: see `masked_logits`.
        inputs: see `masked_logits`.
        kept_by_layer: see `masked_logits`.
        features: see `masked_logits`.

    Returns:
        For each sample ``(n, vocabulary)``, one row for each token that reaches the last layer.

    Raises:
        InputError: see `masked_logits`.
        UnsupportedModelError: positions of the model are not plain numbers.
    """
    if "compact" not in adapter.allowed_positions:
        raise UnsupportedModelError(
            f"positions: those of {type(adapter.model).__name__} have rows and columns and cannot be renumbered; use "
            "masked_logits, which serves original positions"
        )
    kept = _checked(adapter, inputs, kept_by_layer)
    hidden = entering(model, adapter, inputs) if features is None else features.hidden
    rows = []
    with torch.no_grad(), attention_of(adapter.language_model, "eager"):
        for sample, valid in enumerate(valid_tokens(inputs)):
            columns = valid.nonzero().squeeze(1)
            own = {after: kept_mask[sample] for after, kept_mask in kept.items()}
            rows.append(_by_hand(adapter, hidden[sample : sample + 1].index_select(1, columns), columns, own))
    return rows


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _masking(
    adapter: Adapter,
    index: int,
    valid: torch.Tensor,
    here: torch.Tensor | None,
    features: Features | None,
    later: Mapping[int, torch.Tensor],
) -> Hook:
    """Hides the dropped columns from a decoder layer, and gives it the features that are not the stock model's."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = entry(args, kwargs)
        if hidden.shape[:2] != valid.shape:
            raise InputError(
                f"layer {index}: found {tuple(hidden.shape[:2])} tokens, the inputs have {tuple(valid.shape)}; detach "
                "the pipeline, and pass inputs whose placeholders are all in input_ids"
            )
        if index == 0 and features is not None:
            hidden = features.hidden.to(hidden)
        if index in later:
            hidden = hidden + later[index].to(hidden)
        if here is not None:
            kwargs = {**kwargs, "attention_mask": _without(adapter, index, hidden, here, kwargs)}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _without(
    adapter: Adapter, index: int, hidden: torch.Tensor, here: torch.Tensor, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """A layer's mask without the columns that are gone."""
    if "attention_mask" not in kwargs:
        raise UnsupportedModelError(
            f"layer {index}: {type(adapter.layers[index]).__name__} is called without attention_mask, so tokens cannot "
            "be hidden from it"
        )
    mask, window = kwargs["attention_mask"], adapter.window(index)
    here = here.to(hidden.device)
    # A window counts the tokens that are there, so it cannot be cut out of a mask that counts all of them.
    if mask is None or window is not None:
        return _causal(here, window, hidden.dtype)
    length = hidden.shape[1]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedModelError(
            f"layer {index}: found an attention_mask of {found}; eager attention takes (B, 1, {length}, {length}): the "
            "oracle serves models whose layers do"
        )
    columns = here[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & columns
    # The lowest finite number: with -inf a row that sees nothing would be nan, also where others weigh it with 0.
    return torch.where(columns, mask, torch.finfo(mask.dtype).min)


def _causal(here: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention scores, ``(B, 1, S, S)``: each row sees what is there up to itself, in its window.

    Args:
        here: bool ``(B, S)``.
        window: tokens that are there which a row sees, itself included; None: all.
        dtype: of the mask.
    """
    length = here.shape[1]
    place = torch.arange(length, device=here.device)
    seen = here[:, None, :] & (place[None, :] <= place[:, None])
    if window is not None:
        rank = here.cumsum(1)
        seen = seen & (rank[:, :, None] - rank[:, None, :] < window)
    nothing = torch.zeros(seen.shape, dtype=dtype, device=here.device)
    return nothing.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _averages(adapter: Adapter, inputs: Mapping[str, Any], features: Features, later: dict[int, torch.Tensor]) -> Hook:
    """Takes features that the language model adds between layers away from it, and averages them as tokens merged."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken = adapter.later_features(kwargs, 0)
        if taken is None:
            return args, kwargs
        kwargs, by_layer = taken
        visual, merge_map = placeholders(adapter, inputs), features.merge_map
        members = (
            merge_map[:, None, :] == torch.arange(merge_map.shape[1], device=merge_map.device)[None, :, None]
        ).float()
        members = members / members.sum(-1, keepdim=True).clamp_min(1)
        for layer, values in by_layer.items():
            whole = torch.zeros(features.hidden.shape, device=values.device)
            whole[visual] = values.float()
            later[layer] = members @ whole
        return args, kwargs

    return hook


# Layer by layer


def _by_hand(
    adapter: Adapter, hidden: torch.Tensor, columns: torch.Tensor, kept: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """One sample through the decoder layers: ``(1, n, D)`` at columns ``(n,)``, `kept` bool ``(S,)``."""
    decoder: Any = adapter.language_model
    for index, layer in enumerate(adapter.layers):
        if index in kept:
            stays = kept[index][columns].nonzero().squeeze(1)
            hidden, columns = hidden.index_select(1, stays), columns.index_select(0, stays)
        positions = torch.arange(len(columns), device=hidden.device)[None]
        output = layer(
            hidden,
            attention_mask=_causal(torch.ones_like(positions, dtype=torch.bool), adapter.window(index), hidden.dtype),
            position_ids=positions,
            position_embeddings=decoder.rotary_emb(hidden, positions),
        )
        hidden = output[0] if isinstance(output, tuple) else output
    head = adapter.model.get_output_embeddings()  # type: ignore[operator]  # a method of every transformers model
    logits: torch.Tensor = head(decoder.norm(hidden))[0]
    return logits


# What is given


def _checked(adapter: Adapter, inputs: Mapping[str, Any], kept_by_layer: KeptByLayer) -> dict[int, torch.Tensor]:
    """By rising layer, without padding.

    Raises:
        InputError: a layer that the model does not have, another shape, or a token that comes back.
    """
    valid, layers = valid_tokens(inputs), len(adapter.layers)
    before, out = valid, {}
    for layer, kept_mask in sorted(kept_by_layer.items()):
        if not 0 <= layer < layers:
            raise InputError(f"kept_by_layer: there is no layer {layer}; the model has layers 0 to {layers - 1}")
        if kept_mask.dtype != torch.bool or kept_mask.shape != valid.shape:
            raise InputError(
                f"kept_by_layer[{layer}]: found {kept_mask.dtype} {tuple(kept_mask.shape)}, expected torch.bool "
                f"{tuple(valid.shape)}, as input_ids"
            )
        kept_mask = kept_mask.to(valid.device) & valid
        if bool((kept_mask & ~before).any()):
            sample, column = (kept_mask & ~before).nonzero()[0].tolist()
            raise InputError(
                f"kept_by_layer[{layer}]: sample {sample} has column {column} again, which was gone in an earlier "
                "layer; keep it there or drop it here"
            )
        before = out[layer] = kept_mask
    return out
