"""What the runtime knows of the forward that is running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.probe import LayerInputs
from .stage import Prefill


@dataclass(frozen=True)
class Segment:
    """What all layers between two stages share in a forward.

    Attributes:
        valid: bool ``(B, past + S)``, False at padding.
        ragged: False where `valid` is known to be all True.
        dropped: int64 ``(B,)``, tokens dropped so far in the conversation.
        mask: the attention mask in the backend's form.
        rotary: the rotary embeddings of the tokens that are there.
    """

    valid: torch.Tensor
    ragged: bool
    dropped: torch.Tensor
    mask: Any
    rotary: Any


@dataclass
class Forward:
    """One running forward of the model.

    Attributes:
        entry: the module through which it came in; the forward ends with it.
        thread: the thread that runs it.
        call: arguments of the multimodal module, by name.
        pictures: whether the call brings pictures.
        reached: whether the language model was called.
        modalities: what was encoded within this forward.
        features: visual features to be added in front of a layer, ``(B, N, D)``.
        begin: when the language model started, in seconds.
        mask: of the whole conversation, bool or int ``(B, past + S)``, or None.
        positions: as the language model got them, or None.
        asks_cache: whether keys and values are to be kept, so that every layer must meet a cache.
        cache: the cache of this forward, as soon as it was seen.
        past: tokens of the conversation in that cache before this forward.
        brought: tokens of the conversation that this forward brings, the dropped ones included.
        visited: calls of decoder layers from the first reduction on.
        prefill: the stages' state, where the forward brings visual tokens.
        active: whether decoder layers need anything of the runtime.
        segments: by number of stages passed and sliding window of the layer.
        ran: what entered the last layer, where a scorer wants it.
    """

    entry: nn.Module
    thread: int
    call: Mapping[str, Any] = field(default_factory=dict)
    pictures: bool = False
    reached: bool = False
    modalities: set[str] = field(default_factory=set)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    begin: float = 0.0
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    asks_cache: bool = False
    cache: Any = None
    past: int = 0
    brought: int = 0
    visited: int = 0
    prefill: Prefill | None = None
    active: bool = False
    segments: dict[tuple[int, int | None], Segment] = field(default_factory=dict)
    ran: LayerInputs | None = None

    def tokens(self, hidden: torch.Tensor) -> int:
        """Tokens of the conversation that this forward brings, the dropped ones included."""
        return hidden.shape[1] if self.prefill is None else self.prefill.record.valid.shape[1]
