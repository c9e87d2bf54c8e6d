"""One forward of the stock model, eager and without a cache, and what its inputs say by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError
from .bench import attention_of

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: Where configurations keep the ids of placeholders.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def stock_logits(model: nn.Module, adapter: Adapter, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits ``(B, S, vocabulary)`` of one forward with eager attention in the decoder and no cache."""
    with torch.no_grad(), attention_of(adapter.language_model, "eager"):
        logits: torch.Tensor = model(**{**inputs, "use_cache": False}).logits
    return logits


def entering(model: nn.Module, adapter: Adapter, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What enters the first decoder layer of the stock model, ``(B, S, D)``."""
    with first_entry(adapter) as held:
        stock_logits(model, adapter, inputs)
    return held[0]


@contextmanager
def first_entry(adapter: Adapter) -> Iterator[list[torch.Tensor]]:
    """A list that holds, after the block's first forward, what entered its first decoder layer.

    Inside a pipeline's block it holds what the pipeline left.
    """
    held: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not held:
            held.append(entry(args, kwargs).detach().clone())

    handle = adapter.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield held
    finally:
        handle.remove()


def entry(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a decoder layer is called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def valid_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """bool ``(B, S)``, False at padding.

    Raises:
        InputError: the mask is not the processor's.
    """
    mask = inputs.get("attention_mask")
    ids: torch.Tensor = inputs["input_ids"]
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask: found {tuple(mask.shape)}, expected {tuple(ids.shape)}, as input_ids: padding is read "
            "off the processor's own mask; pass that one"
        )
    valid: torch.Tensor = mask.bool()
    return valid


def placeholders(adapter: Adapter, inputs: Mapping[str, Any]) -> torch.Tensor:
    """bool ``(B, S)``, True where the ids stand for images, newlines of tiled ones included."""
    config = adapter.model.config
    tokens = [token for name in PLACEHOLDERS if isinstance(token := getattr(config, name, None), int)]
    ids: torch.Tensor = inputs["input_ids"]
    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device)) & valid_tokens(inputs)
