"""What a decoder layer is called with once tokens are gone: masks, rotary embeddings, a cache layer that knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..core.backbone import Backbone
from ..core.probe import LayerInputs, Past
from ..core.transfer import upload
from ..core.upstream import LayerCall, Role, causal_mask, unsupported
from ..errors import InputError
from .cache import ReducedLayer, layer_of, reduced_layer
from .forward import Forward, Segment

#: Decoding steps that one mask serves.
STEPS_AHEAD = 64


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
            return self._own_positions(forward, index, hidden, given) if forward.position_rows else None
        call.check_mask(given)
        key = sum(after <= index for after in self._stage_layers), self._backbone.window(index)
        segment = forward.segments.get(key)
        if segment is None:
            segment = self._segment(forward, index, hidden, given, shorter=shorter)
            forward.segments[key] = segment
        if cache is not None:
            past = None if segment.valid is None else segment.valid[:, : segment.keys - hidden.shape[1]]
            own = reduced_layer(cache, index, self._pipeline_name, past)
            if own.held and own.keys is not None and own.keys.shape[0] != hidden.shape[0]:
                raise InputError(f"cache: it holds {own.keys.shape[0]} samples, the forward brings {hidden.shape[0]}")
            own.announce(segment)
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
        held, past_valid, past_dropped = self._past(forward, index, hidden)
        length = hidden.shape[1]
        if shorter and forward.prefill is not None:
            state = forward.prefill.state
            new_valid = state.valid.to(hidden.device) if state.ragged else None
            here = state.dropped_in_forward()
            dropped: torch.Tensor | None = here if past_dropped is None else past_dropped + here
            rotary = self._rotary(forward, index, hidden, given, past_dropped)
        else:
            new_valid = None if forward.mask is None else forward.mask[:, -length:].to(hidden.device).bool()
            dropped = past_dropped
            rotary = self._decoded_rotary(forward, index, hidden, given, past_dropped)
        if new_valid is None and not shorter:
            valid = past_valid  # what it does not reach is valid
            mask, ahead = self._decoded_mask(forward, index, hidden, held, past_valid)
        else:
            valid, ahead = _joined(past_valid, held, new_valid, length), None
            mask = self._mask(index, hidden, valid, held)
        return Segment(
            held + length, valid, dropped, mask, rotary, forward.tokens(hidden), reduced=shorter, mask_ahead=ahead
        )

    def _mask(self, index: int, hidden: torch.Tensor, valid: torch.Tensor | None, past: int) -> Any:
        return causal_mask(
            self._backbone.text_config, hidden, valid, past=past, layer=index, window=self._backbone.window(index)
        )

    def _decoded_mask(
        self, forward: Forward, index: int, hidden: torch.Tensor, held: int, past_valid: torch.Tensor | None
    ) -> tuple[Any, Any]:
        """The mask of tokens of which none is padding, and one that serves the next steps too, where there is one.

        What comes later is valid and behind the query, so that a mask for one query of which the first columns are
        taken is the same at every step.
        """
        length, window = hidden.shape[1], self._backbone.window(index)
        layer = None if forward.cache is None else layer_of(forward.cache, index)
        steady = forward.appended and length == 1 and not torch.compiler.is_compiling()
        if not steady or window is not None or not isinstance(layer, ReducedLayer):
            return self._mask(index, hidden, _joined(past_valid, held, None, length), held), None
        ahead = layer.mask_ahead
        if ahead is None or ahead.shape[-1] <= held or ahead.device != hidden.device:
            past = held + STEPS_AHEAD
            ahead = self._mask(index, hidden, _joined(past_valid, past, None, 1), past)
        if not isinstance(ahead, torch.Tensor):  # none is needed, or a block mask
            return (
                None if ahead is None else self._mask(index, hidden, _joined(past_valid, held, None, 1), held)
            ), None
        return ahead[..., : held + 1], ahead

    def _past(
        self, forward: Forward, index: int, hidden: torch.Tensor
    ) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
        """Keys that the layer's cache holds, which of them are padding, and the tokens dropped so far.

        The tensors are bool ``(B, n)`` for the first n keys, None where no key is padding, and int64 ``(B,)``, None
        where no token was dropped.
        """
        layer = None if forward.cache is None else layer_of(forward.cache, index)
        device = hidden.device
        if isinstance(layer, ReducedLayer):
            valid, dropped = layer.valid, layer.dropped
            return (
                layer.held,
                None if valid is None else valid.to(device),
                None if dropped is None else dropped.to(device),
            )
        held = 0 if layer is None or not layer.is_initialized else int(layer.get_seq_length())
        mask = forward.mask
        if mask is None or not held:
            return held, None, None
        expected = held + forward.tokens(hidden)
        if mask.shape[1] != expected:
            raise InputError(
                f"mask: found {mask.shape[1]} columns, but the cache holds {held} tokens and the forward "
                f"brings {expected - held}: pass a mask for the whole conversation"
            )
        return held, mask[:, :held].to(device).bool(), None

    # Positions

    def stack_positions(self, forward: Forward, embeddings: torch.Tensor) -> torch.Tensor | None:
        """Position ids for all layers of a forward on a reduced cache, so that one rotary call serves every layer.

        Survivors are renumbered, so layers behind different reductions want different positions. The language model
        computes rotary embeddings once, for the ids that it is given: here these are one row of ids for each number of
        reductions passed, side by side, of which every layer then takes its own columns.

        Args:
            forward: the running forward, which brings no images; the number of rows is noted in it.
            embeddings: ``(B, S, D)``, what enters the language model.

        Returns:
            int64 ``(B, rows * S)``; None where layers keep their own positions.
        """
        if not self._compact or forward.cache is None:
            return None
        ids = self._position_ids(forward, 0, embeddings, {})
        rows = []
        for passed in range(1, len(self._stage_layers) + 1):
            layer = layer_of(forward.cache, sorted(self._stage_layers)[passed - 1])
            dropped = layer.dropped if isinstance(layer, ReducedLayer) else None
            rows.append(torch.zeros_like(ids[:, 0]) if dropped is None else dropped.to(ids.device))
        forward.positions, forward.position_rows = ids, len(rows) + 1
        renumbered = (ids[:, None] - torch.stack(rows, 1)[..., None]).clamp_min(0)
        return torch.cat([ids, renumbered.flatten(1)], 1)

    def _own_positions(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a layer whose cache is whole, where positions are stacked."""
        call = self._calls[index]
        changed = {**given, call.rotary: self._stacked_rotary(forward, index, hidden, given)}
        changed.update(dict.fromkeys(call.position_names(given), forward.positions))
        return changed

    def _stacked_rotary(self, forward: Forward, index: int, hidden: torch.Tensor, given: Mapping[str, Any]) -> Any:
        """A layer's columns of the rotary embeddings that were computed for all; a view."""
        passed, length = sum(after <= index for after in self._stage_layers), hidden.shape[1]
        call = self._calls[index]
        return _columns(call.rotary_of(given), passed * length, length, forward.position_rows * length, call.where)

    def _decoded_rotary(
        self,
        forward: Forward,
        index: int,
        hidden: torch.Tensor,
        given: Mapping[str, Any],
        past_dropped: torch.Tensor | None,
    ) -> Any:
        """Rotary embeddings of tokens of which none is dropped, behind those that were."""
        if forward.position_rows:
            return self._stacked_rotary(forward, index, hidden, given)
        if not self._compact or past_dropped is None:
            return self._calls[index].rotary_of(given)
        ids = self._position_ids(forward, index, hidden, given) - past_dropped[:, None]
        return self._backbone.rotary(hidden, ids.clamp_min(0))

    def _rotary(
        self,
        forward: Forward,
        index: int,
        hidden: torch.Tensor,
        given: Mapping[str, Any],
        past_dropped: torch.Tensor | None,
    ) -> Any:
        """Rotary embeddings of the survivors: renumbered, or each its own."""
        assert forward.prefill is not None
        state = forward.prefill.state
        if not self._compact:
            return self._backbone.take_positions(self._calls[index].rotary_of(given), state.column)
        ids = self._position_ids(forward, index, hidden, given).gather(1, state.column.to(hidden.device))
        known = forward.prefill.host or state
        ids = ids - upload(known.dropped_before(), hidden.device)
        ids = ids if past_dropped is None else ids - past_dropped[:, None]
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
        held, past_valid, past_dropped = self._past(forward, index, hidden)
        others = call.others(given)
        if not shrunk and forward.prefill.shorter:
            passed = sum(after < index for after in self._stage_layers)
            before = next((s for (number, _), s in forward.segments.items() if number == passed), None)
            rotary = before.rotary if before is not None else self._rotary(forward, index, hidden, given, past_dropped)
            others = self._others(forward, call, given, hidden)
        past = None
        if held and layer is not None and layer.keys is not None and layer.values is not None:
            device = hidden.device
            past_valid = _joined(past_valid, held, None, 0)
            if past_valid is None:
                past_valid = torch.ones(hidden.shape[0], held, dtype=torch.bool, device=device)
            past = Past(layer.keys.to(device), layer.values.to(device), past_valid)
        return LayerInputs(hidden, state.valid.to(hidden.device), rotary, past, others, padded=state.ragged)


def _joined(past: torch.Tensor | None, held: int, new: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Valid columns of what a cache holds and of what comes, bool ``(B, held + length)``; None where all are valid.

    Columns that `past` does not reach are valid.
    """
    if past is None and new is None:
        return None
    if past is None:
        assert new is not None
        return nn.functional.pad(new, (held, 0), value=True) if held else new
    missing = held - past.shape[1] + (length if new is None else 0)
    past = nn.functional.pad(past, (0, missing), value=True) if missing else past
    return past if new is None else torch.cat([past, new], dim=1)


def _columns(embeddings: Any, first: int, length: int, total: int, where: str) -> Any:
    """Some columns of rotary embeddings, tensors ``(..., S, features)`` in tuples and dicts, as views.

    Raises:
        UnsupportedModelError: they have not one column for each position that the language model was given.
    """
    if isinstance(embeddings, (tuple, list)):
        return type(embeddings)(_columns(item, first, length, total, where) for item in embeddings)
    if isinstance(embeddings, dict):
        return {key: _columns(item, first, length, total, where) for key, item in embeddings.items()}
    if not isinstance(embeddings, torch.Tensor) or embeddings.ndim < 2 or embeddings.shape[-2] != total:
        found = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else f"a {type(embeddings).__name__}"
        raise unsupported(f"{where}.forward", f"rotary embeddings for {total} positions", f"{found}")
    return embeddings.narrow(-2, first, length)
