"""What a decoder layer is called with once tokens are gone: masks, rotary embeddings, a cache layer that knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from trio.errors import InputError
from trio.masks import causal_mask
from trio.probe import LayerInputs, Past
from trio.runtime.backbone import Backbone
from trio.runtime.cache import ReducedLayer, layer_of, reduced_layer
from trio.runtime.forward import Forward, Segment


class Shrinker:
    """Serves every decoder layer the arguments that fit the tokens it has."""

    def __init__(self, backbone: Backbone, stage_layers: Collection[int], *, owner: str, compact: bool) -> None:
        """Binds a shrinker.

        Args:
            backbone: the model, through its adapter.
            stage_layers: decoder layers in front of which stages stand.
            owner: name of the pipeline, written on the caches.
            compact: whether survivors are renumbered.
        """
        self._backbone = backbone
        self._stage_layers = tuple(stage_layers)
        self._owner = owner
        self._compact = compact

    def arguments(
        self, forward: Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The layer's arguments where it or its cache holds fewer tokens than the conversation, else None."""
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else layer_of(cache, index)
        prefill = forward.prefill
        shorter = prefill is not None and prefill.shorter
        if not shorter and not isinstance(layer, ReducedLayer):
            return None
        number = sum(after <= index for after in self._stage_layers)
        segment = forward.segments.get(number)
        if segment is None:
            segment = self._segment(forward, index, hidden, kwargs, shorter=shorter)
            forward.segments[number] = segment
        if cache is not None:
            batch = hidden.shape[0]
            past = segment.valid[:, : segment.valid.shape[1] - hidden.shape[1]]
            own = reduced_layer(cache, index, self._owner, past, ragged=bool(past.shape[1]) and segment.ragged)
            if own.valid is not None and own.valid.shape[0] != batch:
                raise InputError(
                    f"past_key_values: the cache holds {own.valid.shape[0]} samples, the forward brings {batch}"
                )
            tokens = forward.tokens(hidden)
            own.announce(segment.valid, segment.dropped, tokens=tokens, ragged=segment.ragged, reduced=shorter)
        return {
            **kwargs,
            "attention_mask": segment.mask,
            "position_embeddings": segment.position_embeddings,
            # Gaps would read as packed sequences; the rotation is in the embeddings already.
            "position_ids": None,
        }

    def _segment(
        self, forward: Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any], *, shorter: bool
    ) -> Segment:
        past_valid, past_dropped, past_ragged = self._past(forward, index, hidden, kwargs.get("past_key_values"))
        device = hidden.device
        if shorter and forward.prefill is not None:
            sequence = forward.prefill.sequence
            valid, ragged, dropped = sequence.valid, sequence.ragged, past_dropped + sequence.dropped
            embeddings = self._positions(forward, hidden, kwargs, past_dropped)
        else:
            ragged = forward.attention_mask is not None
            valid = _last_columns(forward.attention_mask, hidden)
            dropped = past_dropped
            embeddings = kwargs["position_embeddings"]
            if self._compact:
                ids = self._position_ids(forward, hidden, kwargs) - past_dropped[:, None]
                embeddings = self._backbone.rotary(hidden, ids.clamp_min(0))
        valid = torch.cat([past_valid, valid.to(device)], dim=1)
        ragged = ragged or past_ragged
        mask = causal_mask(
            self._backbone.text_config,
            hidden,
            valid if ragged else None,
            past=past_valid.shape[1],
            layer=index,
            window=self._backbone.window(index),
        )
        return Segment(valid, ragged, dropped, mask, embeddings)

    def _past(
        self, forward: Forward, index: int, hidden: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Padding among what the layer's cache holds, tokens dropped so far, and whether there is any padding."""
        layer = None if cache is None else layer_of(cache, index)
        batch, device = hidden.shape[0], hidden.device
        if isinstance(layer, ReducedLayer) and layer.valid is not None and layer.dropped is not None:
            return layer.valid.to(device), layer.dropped.to(device), layer.ragged
        held = 0 if layer is None or not layer.is_initialized else int(layer.get_seq_length())
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        mask = forward.attention_mask
        if mask is None or not held:
            return torch.ones(batch, held, dtype=torch.bool, device=device), nothing, False
        expected = held + forward.tokens(hidden)
        if mask.shape[1] != expected:
            raise InputError(
                f"attention_mask: found {mask.shape[1]} columns, but the cache holds {held} tokens and the forward "
                f"brings {expected - held}: pass a mask for the whole conversation"
            )
        return mask[:, :held].to(device).bool(), nothing, True

    def _positions(
        self, forward: Forward, hidden: torch.Tensor, kwargs: dict[str, Any], past_dropped: torch.Tensor
    ) -> Any:
        """Rotary embeddings of the survivors: renumbered, or each its own."""
        assert forward.prefill is not None
        sequence = forward.prefill.sequence
        if not self._compact:
            return self._backbone.take_positions(kwargs["position_embeddings"], sequence.column)
        ids = self._position_ids(forward, hidden, kwargs).gather(1, sequence.column.to(hidden.device))
        ids = ids - sequence.dropped_before.to(hidden.device) - past_dropped[:, None]
        return self._backbone.rotary(hidden, ids.clamp_min(0))

    def _position_ids(self, forward: Forward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The forward's own position ids, ``(B, S)``."""
        ids = kwargs.get("position_ids")
        ids = forward.position_ids if ids is None else ids
        if ids is None:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            ids = (torch.arange(forward.tokens(hidden), device=hidden.device) + past)[None]
        expanded: torch.Tensor = ids.to(hidden.device).expand(hidden.shape[0], -1)
        return expanded

    def inputs(
        self, forward: Forward, index: int, hidden: torch.Tensor, kwargs: Mapping[str, Any], *, shrunk: bool = False
    ) -> LayerInputs:
        """What enters a layer, for its probe: the sequence as it stands before the layer's own stage."""
        assert forward.prefill is not None
        sequence = forward.prefill.sequence
        embeddings = kwargs["position_embeddings"]
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else layer_of(cache, index)
        past_valid, past_dropped, _ = self._past(forward, index, hidden, cache)
        if not shrunk and forward.prefill.shorter:
            before = forward.segments.get(sum(after < index for after in self._stage_layers))
            embeddings = (
                before.position_embeddings
                if before is not None
                else self._positions(forward, hidden, dict(kwargs), past_dropped)
            )
        past = None
        if past_valid.shape[1] and layer is not None and layer.keys is not None and layer.values is not None:
            device = hidden.device
            past = Past(layer.keys.to(device), layer.values.to(device), past_valid)
        return LayerInputs(hidden, sequence.valid.to(hidden.device), embeddings, past)


def _last_columns(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    batch, length = hidden.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    return mask[:, -length:].bool()
