"""What a decoder layer is called with once tokens are gone: masks, rotary embeddings, a cache layer that knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..core.backbone import Backbone
from ..core.probe import LayerInputs, Past
from ..core.upstream import LayerCall, Role, causal_mask
from ..errors import InputError
from .cache import ReducedLayer, layer_of, reduced_layer
from .forward import Forward, Segment


class Shrinker:
    """Serves every decoder layer the arguments that fit the tokens it has."""

    def __init__(self, backbone: Backbone, stage_layers: Collection[int], *, pipeline_name: str, compact: bool) -> None:
        """Binds a shrinker.

        Args:
            backbone: the model, through its adapter.
            stage_layers: decoder layers in front of which stages stand.
            pipeline_name: written on the caches.
            compact: whether survivors are renumbered.
        """
        self._backbone = backbone
        self._calls = backbone.upstream.layers
        self._stage_layers = tuple(stage_layers)
        self._pipeline_name = pipeline_name
        self._compact = compact

    def arguments(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The layer's arguments where it or its cache holds fewer tokens than the conversation, else None.

        Args:
            forward: the running forward, its cache known.
            index: the layer.
            hidden: ``(B, S', D)``, what enters it.
            given: the arguments that the language model gave, by name.
        """
        call, cache = self._calls[index], forward.cache
        layer = None if cache is None else layer_of(cache, index)
        prefill = forward.prefill
        shorter = prefill is not None and prefill.shorter
        if not shorter and not isinstance(layer, ReducedLayer):
            return None
        call.check_mask(given)
        key = sum(after <= index for after in self._stage_layers), self._backbone.window(index)
        segment = forward.segments.get(key)
        if segment is None:
            segment = self._segment(forward, index, hidden, given, shorter=shorter)
            forward.segments[key] = segment
        if cache is not None:
            batch = hidden.shape[0]
            past = segment.valid[:, : segment.valid.shape[1] - hidden.shape[1]]
            own = reduced_layer(cache, index, self._pipeline_name, past, ragged=bool(past.shape[1]) and segment.ragged)
            if own.valid is not None and own.valid.shape[0] != batch:
                raise InputError(f"cache: it holds {own.valid.shape[0]} samples, the forward brings {batch}")
            tokens = forward.tokens(hidden)
            own.announce(
                segment.valid, segment.dropped_in_conversation, tokens=tokens, ragged=segment.ragged, reduced=shorter
            )
        changed = {**given, call.mask: segment.mask, call.rotary: segment.rotary}
        # Gaps would read as packed sequences; the rotation is in the rotary embeddings already.
        changed.update(dict.fromkeys(call.position_names(given)))
        if shorter:
            changed.update(self._others(forward, call, given, hidden))
        return changed

    def _others(
        self, forward: Forward, call: LayerCall, given: Mapping[str, Any], hidden: torch.Tensor
    ) -> dict[str, Any]:
        """Further arguments for the tokens that are there, such as token types of a mixture of experts."""
        assert forward.prefill is not None
        columns = forward.prefill.state.column.to(hidden.device)
        return call.shrink_others(given, columns, forward.prefill.record.valid.shape[1])

    def _segment(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: dict[str, Any], *, shorter: bool
    ) -> Segment:
        past_valid, past_dropped, past_ragged = self._past(forward, index, hidden)
        device = hidden.device
        if shorter and forward.prefill is not None:
            state = forward.prefill.state
            valid, ragged, dropped = state.valid, state.ragged, past_dropped + state.dropped_in_forward
            rotary = self._rotary(forward, index, hidden, given, past_dropped)
        else:
            ragged = forward.mask is not None
            valid = _last_columns(forward.mask, hidden)
            dropped = past_dropped
            rotary = self._calls[index].rotary_of(given)
            if self._compact:
                ids = self._position_ids(forward, index, hidden, given) - past_dropped[:, None]
                rotary = self._backbone.rotary(hidden, ids.clamp_min(0))
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
        return Segment(valid, ragged, dropped, mask, rotary)

    def _past(self, forward: Forward, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Padding among what the layer's cache holds, tokens dropped so far, and whether there is any padding."""
        layer = None if forward.cache is None else layer_of(forward.cache, index)
        batch, device = hidden.shape[0], hidden.device
        if isinstance(layer, ReducedLayer) and layer.valid is not None and layer.dropped is not None:
            return layer.valid.to(device), layer.dropped.to(device), layer.ragged
        held = 0 if layer is None or not layer.is_initialized else int(layer.get_seq_length())
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        mask = forward.mask
        if mask is None or not held:
            return torch.ones(batch, held, dtype=torch.bool, device=device), nothing, False
        expected = held + forward.tokens(hidden)
        if mask.shape[1] != expected:
            raise InputError(
                f"mask: found {mask.shape[1]} columns, but the cache holds {held} tokens and the forward "
                f"brings {expected - held}: pass a mask for the whole conversation"
            )
        return mask[:, :held].to(device).bool(), nothing, True

    def _rotary(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: Mapping[str, Any], past_dropped: torch.Tensor
    ) -> Any:
        """Rotary embeddings of the survivors: renumbered, or each its own."""
        assert forward.prefill is not None
        state = forward.prefill.state
        if not self._compact:
            return self._backbone.take_positions(self._calls[index].rotary_of(given), state.column)
        ids = self._position_ids(forward, index, hidden, given).gather(1, state.column.to(hidden.device))
        ids = ids - state.dropped_before.to(hidden.device) - past_dropped[:, None]
        return self._backbone.rotary(hidden, ids.clamp_min(0))

    def _position_ids(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: Mapping[str, Any]
    ) -> torch.Tensor:
        """The forward's own position ids, ``(B, S)``."""
        ids = self._calls[index].read(Role.POSITIONS, given)
        ids = forward.positions if ids is None else ids
        if ids is None:
            ids = (torch.arange(forward.tokens(hidden), device=hidden.device) + forward.past)[None]
        expanded: torch.Tensor = ids.to(hidden.device).expand(hidden.shape[0], -1)
        return expanded

    def inputs(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: Mapping[str, Any], *, shrunk: bool = False
    ) -> LayerInputs:
        """What enters a layer, for its probe: the sequence as it stands before the layer's own stage.

        Args:
            forward: the running forward.
            index: the layer.
            hidden: ``(B, S', D)``.
            given: the layer's arguments by name.
            shrunk: whether these are those that `arguments` gave.
        """
        assert forward.prefill is not None
        state, call = forward.prefill.state, self._calls[index]
        rotary = call.rotary_of(given)
        layer = None if forward.cache is None else layer_of(forward.cache, index)
        past_valid, past_dropped, _ = self._past(forward, index, hidden)
        others = call.others(given)
        if not shrunk and forward.prefill.shorter:
            passed = sum(after < index for after in self._stage_layers)
            before = next((s for (number, _), s in forward.segments.items() if number == passed), None)
            rotary = before.rotary if before is not None else self._rotary(forward, index, hidden, given, past_dropped)
            others = self._others(forward, call, given, hidden)
        past = None
        if past_valid.shape[1] and layer is not None and layer.keys is not None and layer.values is not None:
            device = hidden.device
            past = Past(layer.keys.to(device), layer.values.to(device), past_valid)
        return LayerInputs(hidden, state.valid.to(hidden.device), rotary, past, others)


def _last_columns(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    batch, length = hidden.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    return mask[:, -length:].bool()
