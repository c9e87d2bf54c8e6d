"""The runtime: hooks on a stock model that run stages and serve every layer its own masks and positions."""

from __future__ import annotations

import inspect
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trio.context import ProbeName
from trio.errors import AttachError, InputError, NonFiniteError
from trio.masks import causal_mask
from trio.probe import LayerInputs, Past, Probe
from trio.runtime.backbone import Backbone
from trio.runtime.cache import ReducedLayer, check_can_shrink, layer_of, reduced_layer
from trio.runtime.generate import GuardedGenerate
from trio.runtime.methods import NotedEncoder, StandIn
from trio.runtime.record import PrefillRecord
from trio.runtime.sequence import Images, NewlinePolicy, start
from trio.runtime.sequence import Sequence as Tokens
from trio.runtime.stage import BoundStage, Prefill, now, run_stage

#: Tokens to keep, as a user gives them: by stage, sample and image, places among the image's own tokens.
Selection = Sequence[Sequence[Sequence[Sequence[int]]]]


@dataclass
class _Forward:
    """One running forward of the model."""

    entry: nn.Module
    thread: int
    call: Mapping[str, Any] = field(default_factory=dict)
    pictures: bool = False
    modalities: set[str] = field(default_factory=set)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    begin: float = 0.0
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    prefill: Prefill | None = None
    active: bool = False
    segments: dict[int, _Segment] = field(default_factory=dict)
    ran: LayerInputs | None = None


@dataclass(frozen=True)
class _Segment:
    """What all layers between two stages share in a forward."""

    valid: torch.Tensor
    ragged: bool
    dropped: torch.Tensor
    mask: Any
    position_embeddings: Any


@dataclass
class _Uncached:
    """The last forward without a cache: generation without one repeats the prompt at every step."""

    input_ids: torch.Tensor
    visual: torch.Tensor
    forced: dict[int, torch.Tensor]


class Runtime:
    """Attaches stages to a model and takes them off again.

    The model's classes, modules and weights stay as they are: only hooks are added, and a guard around `generate` that
    refuses the ways of generating that cannot work.
    """

    def __init__(
        self,
        backbone: Backbone,
        stages: Sequence[BoundStage],
        *,
        owner: str,
        compact: bool,
        full_report: bool,
        newlines: NewlinePolicy = "with-row",
        on_prefill: Callable[[PrefillRecord], None],
        on_decode: Callable[[float], None],
    ) -> None:
        """Binds a runtime.

        Args:
            backbone: the model, through its adapter.
            stages: in order of their layers.
            owner: name of the pipeline; it is written on the caches that it reduces.
            compact: whether survivors are renumbered.
            full_report: keep saliencies, measure times and bytes.
            newlines: what happens to tokens that end the rows of a picture.
            on_prefill: told after each forward that brought visual tokens.
            on_decode: told the seconds of each other forward, where `full_report` is set.
        """
        self._backbone = backbone
        self._stages = {stage.after_layer: stage for stage in stages}
        self._first = min(self._stages, default=0)
        self._needs_ran = {
            stage.after_layer - 1 for stage in stages if "ran" in stage.scorer.required() and stage.after_layer > 0
        }
        self._owner = owner
        self._compact = compact
        self._full = full_report
        self._newlines = newlines
        self._on_prefill = on_prefill
        self._on_decode = on_decode
        self._handles: list[Any] = []
        self._stand_ins: list[StandIn] = []
        self._encoded: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        self._forward: _Forward | None = None
        self._uncached: _Uncached | None = None
        self._signature = inspect.signature(backbone.multimodal.forward)
        self.forced: Selection | None = None
        self.score_only = False

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Puts the hooks on the model.

        Raises:
            AttachError: this or another pipeline is attached already, or the model is in training mode.
        """
        model = self._backbone.model
        there = GuardedGenerate.on(model)
        if there is not None:
            other = "this pipeline" if there.owner is self else f"the pipeline {there.name!r}"
            raise AttachError(
                f"attach: {other} is already attached to this {type(model).__name__}; detach it first "
                "(a `with` block does so at its end)"
            )
        if model.training:
            raise AttachError(
                f"attach: this {type(model).__name__} is in training mode; call model.eval() first: "
                "compression is for inference"
            )
        multimodal = self._backbone.multimodal
        self._stand_ins = [
            GuardedGenerate(model, owner=self, name=self._owner),
            *(
                NotedEncoder(multimodal, name, pixels=self._backbone.pixels, note=self._noting(modality))
                for modality, name in self._backbone.encoders.items()
            ),
        ]
        try:
            self._hook(model, self._before_model)
            self._hook(multimodal, self._before_multimodal, after=True)
            self._hook(self._backbone.language_model, self._before_language_model, after=True)
            for index, layer in enumerate(self._backbone.layers):
                if index >= self._first or index in self._needs_ran:
                    self._hook(layer, self._layer_hook(index))
            for stand_in in self._stand_ins:
                stand_in.install()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes everything off again; does nothing where nothing is attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stand_in in self._stand_ins:
            stand_in.remove()
        self._stand_ins = []
        self._forward = None
        self._uncached = None
        self._encoded.clear()
        if self._lock.locked():
            self._lock.release()

    def _hook(self, module: nn.Module, before: Callable[..., Any], *, after: bool = False) -> None:
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after:
            self._handles.append(module.register_forward_hook(self._after, always_call=True))

    # Around the model

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            raise InputError(
                f"forward: the {type(module).__name__} was put into training mode; call model.eval(), "
                "or detach the pipeline to train"
            )
        if kwargs.get("labels") is not None:
            raise InputError(
                "labels: dropped tokens have no logits, so a loss against labels would be misaligned; "
                "detach the pipeline to compute losses"
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise InputError(
                "logits_to_keep: found a tensor of columns, which would count dropped tokens; pass a number of last "
                "columns instead"
            )

    def _before_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._enter(module)
        call = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}))
        forward.call = call
        forward.pictures = self._backbone.brings_pictures(call)
        if call.get("input_ids") is None and (forward.pictures or call.get("inputs_embeds") is not None):
            raise InputError(
                "inputs_embeds: without input_ids nobody can tell which embeddings are visual tokens; "
                "pass input_ids and pixels, or detach the pipeline"
            )

    def _noting(self, modality: str) -> Callable[[Mapping[str, Any]], None]:
        def note(arguments: Mapping[str, Any]) -> None:
            self._encoded[modality] = arguments
            forward = self._forward
            if forward is not None and forward.thread == threading.get_ident():
                forward.modalities.add(modality)

        return note

    def _before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self._enter(module)
        hidden = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        layers = getattr(cache, "layers", ())
        reduced = any(isinstance(layer, ReducedLayer) for layer in layers)
        if forward.pictures or reduced:
            if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
                check_can_shrink(cache, self._first, len(self._backbone.layers), self._owner)
                raise InputError(
                    "attention_mask: found a prepared mask that is not 2-D, which cannot shrink with the tokens; "
                    "pass the (batch, length) mask of the processor"
                )
            check_can_shrink(cache, self._first, len(self._backbone.layers), self._owner)
        forward.attention_mask = mask
        forward.position_ids = kwargs.get("position_ids")
        if forward.pictures and hidden is not None:
            uncached = cache is None and not _uses_cache(kwargs, self._backbone.text_config)
            forward.prefill = self._start_prefill(forward, hidden, uncached)
        elif hidden is None and not forward.call and kwargs.get("input_ids") is None:
            raise InputError("forward: the language model got neither input_ids nor inputs_embeds")
        forward.active = reduced or forward.prefill is not None
        if self._full:
            forward.begin = now(_device(hidden, kwargs))
        later = None if forward.prefill is None else self._backbone.later_features(kwargs, self._first)
        if later is None:
            return None
        kwargs, features = later
        forward.features = {layer: _by_sample(flat, forward) for layer, flat in features.items()}
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._forward
        if forward is None or forward.thread != threading.get_ident():
            return
        failed = output is None
        try:
            if not failed and module is self._backbone.language_model:
                self._finish(forward, output)
        finally:
            if module is forward.entry or failed:
                self._forward = None
                self._lock.release()

    def _enter(self, module: nn.Module) -> _Forward:
        """The running forward, or a new one; a second thread is refused."""
        me = threading.get_ident()
        running = self._forward
        if running is not None and running.thread == me:
            return running
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "forward: another thread is running this model; an attached pipeline serves one thread at a time: "
                "use a lock, or a model for each thread"
            )
        self._forward = _Forward(entry=module, thread=me)
        return self._forward

    # A forward that brings visual tokens

    def _start_prefill(self, forward: _Forward, hidden: torch.Tensor, uncached: bool) -> Prefill | None:
        batch, length = hidden.shape[:2]
        ids = forward.call["input_ids"].cpu()  # the prefill's synchronisation: from here on counts are known
        given = forward.call.get("mm_encoder_outputs") or {}
        here = forward.modalities | {name for name, output in given.items() if output is not None}
        layout = self._backbone.layout(ids, {name: self._encoded[name] for name in here if name in self._encoded})
        if not any(layout.images):
            return None
        valid = torch.ones(batch, length, dtype=torch.bool)
        if forward.attention_mask is not None:
            valid = forward.attention_mask[:, -length:].cpu().bool()
        sequence, images = start(layout.visual & valid, valid, layout.images, hidden.device, self._newlines)
        prefill = Prefill(
            record=PrefillRecord(
                images=images,
                visual=layout.visual & valid,
                valid=valid,
                newlines=() if sequence.newlines is None else sequence.newlines.counts,
            ),
            sequence=sequence,
            seeds=tuple(_seed(row[there]) for row, there in zip(ids, valid, strict=True)),
            num_layers=len(self._backbone.layers),
            score_only=self.score_only,
            keep_saliency=self._full,
            clock=self._full,
            finite=[],
        )
        if uncached:
            prefill.uncached = ids, hidden[sequence.visual].detach()
        if self.forced is not None:
            prefill.forced = _forced(self.forced, images, [s.index for s in self._stages.values()])
        elif prefill.uncached is not None:
            prefill.forced = self._repeated(*prefill.uncached)
        prefill.record.replayed = prefill.forced is not None
        return prefill

    def _repeated(self, ids: torch.Tensor, visual: torch.Tensor) -> dict[int, torch.Tensor] | None:
        """The last selection, where this forward is the next step of generation without a cache."""
        last = self._uncached
        if last is None or last.input_ids.shape[0] != ids.shape[0] or last.input_ids.shape[1] + 1 != ids.shape[1]:
            return None
        same = torch.equal(ids[:, :-1], last.input_ids) or _same_prompts(ids[:, :-1], last.input_ids)
        alike = visual.shape == last.visual.shape and torch.allclose(visual, last.visual, rtol=1e-3, atol=1e-5)
        return last.forced if same and alike else None

    def _finish(self, forward: _Forward, output: Any) -> None:
        prefill = forward.prefill
        device = output[0].device if isinstance(output, tuple) else output.last_hidden_state.device
        if prefill is None:
            if self._full:
                self._on_decode(now(device) - forward.begin)
            return
        for stage, finite in prefill.finite or ():
            if not bool(finite):
                raise NonFiniteError(
                    f"stage after layer {stage.after_layer}: the scorer {type(stage.scorer).__name__} gave saliencies "
                    "that are not finite; look at the hidden states: float16 may overflow (load the model in bfloat16), "
                    "or weights or pixels hold nan"
                )
        record = prefill.record
        self._uncached = None
        if len(record.lengths) < prefill.num_layers:
            missing = prefill.num_layers - len(record.lengths)
            tokens, length = tuple(prefill.sequence.lengths), prefill.sequence.valid.shape[1]
            whole = (tuple(record.valid.sum(1).tolist()), record.valid.shape[1])
            record.lengths = [whole[1]] * min(missing, self._first) + record.lengths
            record.tokens = [whole[0]] * min(missing, self._first) + record.tokens
            record.lengths += [length] * (prefill.num_layers - len(record.lengths))
            record.tokens += [tokens] * (prefill.num_layers - len(record.tokens))
        if prefill.sequence.valid.shape[1] != record.valid.shape[1] or prefill.sequence.ragged:
            record.columns = prefill.sequence.column
        if self._full:
            record.seconds["prefill"] = now(device) - forward.begin
            cache = output[1] if isinstance(output, tuple) and len(output) > 1 else output.get("past_key_values")
            record.cache_bytes = _cache_bytes(cache)
        if prefill.uncached is not None and not prefill.score_only and self.forced is None:
            ids, visual = prefill.uncached
            self._uncached = _Uncached(ids, visual, {index: kept.kept for index, kept in record.stages.items()})
        if not (prefill.uncached is not None and record.replayed and self.forced is None):
            self._on_prefill(record)

    # Decoder layers

    def _layer_hook(self, index: int) -> Callable[..., Any]:
        def before_layer(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            forward = self._forward
            if forward is None or not forward.active or forward.thread != threading.get_ident():
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            changed = self._at_layer(forward, index, hidden, kwargs)
            if changed is None:
                return None
            hidden, kwargs = changed
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return before_layer

    def _at_layer(
        self, forward: _Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        prefill, cache = forward.prefill, kwargs.get("past_key_values")
        stage = self._stages.get(index)
        arrived = hidden
        if prefill is not None and index in forward.features:
            hidden = _added(hidden, forward.features[index], prefill.sequence)
        if prefill is not None and stage is not None:
            check_can_shrink(cache, index, len(self._backbone.layers), self._owner)
            inputs = self._inputs(forward, index, hidden, kwargs)
            columns = run_stage(stage, prefill, hidden, self._probes(forward, index, inputs))
            if columns is not None:
                forward.segments.clear()
                hidden = hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        forward.ran = None
        changed = self._shrunk(forward, index, hidden, kwargs)
        if prefill is not None and index in self._needs_ran:
            given = kwargs if changed is None else changed
            forward.ran = self._inputs(forward, index, hidden, given, shrunk=True)
        if prefill is not None and index >= self._first:
            prefill.record.lengths.append(prefill.sequence.valid.shape[1])
            prefill.record.tokens.append(prefill.sequence.lengths)
        if changed is None:
            return None if hidden is arrived else (hidden, kwargs)
        return hidden, changed

    def _shrunk(
        self, forward: _Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The layer's arguments where it or its cache holds fewer tokens than the conversation, else None."""
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else layer_of(cache, index)
        prefill = forward.prefill
        shorter = prefill is not None and bool(prefill.record.stages) and prefill.sequence.counts != _started(prefill)
        if not shorter and not isinstance(layer, ReducedLayer):
            return None
        number = sum(after <= index for after in self._stages)
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
            tokens = forward_length(forward, hidden)
            own.announce(segment.valid, segment.dropped, tokens=tokens, ragged=segment.ragged, reduced=shorter)
        return {
            **kwargs,
            "attention_mask": segment.mask,
            "position_embeddings": segment.position_embeddings,
            # Gaps would read as packed sequences; the rotation is in the embeddings already.
            "position_ids": None,
        }

    def _segment(
        self, forward: _Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any], *, shorter: bool
    ) -> _Segment:
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
        return _Segment(valid, ragged, dropped, mask, embeddings)

    def _past(
        self, forward: _Forward, index: int, hidden: torch.Tensor, cache: Any
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
        expected = held + forward_length(forward, hidden)
        if mask.shape[1] != expected:
            raise InputError(
                f"attention_mask: found {mask.shape[1]} columns, but the cache holds {held} tokens and the forward "
                f"brings {expected - held}: pass a mask for the whole conversation"
            )
        return mask[:, :held].to(device).bool(), nothing, True

    def _positions(
        self, forward: _Forward, hidden: torch.Tensor, kwargs: dict[str, Any], past_dropped: torch.Tensor
    ) -> Any:
        """Rotary embeddings of the survivors: renumbered, or each its own."""
        assert forward.prefill is not None
        sequence = forward.prefill.sequence
        if not self._compact:
            return self._backbone.take_positions(kwargs["position_embeddings"], sequence.column)
        ids = self._position_ids(forward, hidden, kwargs).gather(1, sequence.column.to(hidden.device))
        ids = ids - sequence.dropped_before.to(hidden.device) - past_dropped[:, None]
        return self._backbone.rotary(hidden, ids.clamp_min(0))

    def _position_ids(self, forward: _Forward, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The forward's own position ids, ``(B, S)``."""
        ids = kwargs.get("position_ids")
        ids = forward.position_ids if ids is None else ids
        if ids is None:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            ids = (torch.arange(forward_length(forward, hidden), device=hidden.device) + past)[None]
        expanded: torch.Tensor = ids.to(hidden.device).expand(hidden.shape[0], -1)
        return expanded

    def _inputs(
        self, forward: _Forward, index: int, hidden: torch.Tensor, kwargs: Mapping[str, Any], *, shrunk: bool = False
    ) -> LayerInputs:
        """What enters a layer, for its probe: the sequence as it stands before the layer's own stage."""
        assert forward.prefill is not None
        sequence = forward.prefill.sequence
        embeddings = kwargs["position_embeddings"]
        cache = kwargs.get("past_key_values")
        layer = None if cache is None else layer_of(cache, index)
        past_valid, past_dropped, _ = self._past(forward, index, hidden, cache)
        if not shrunk and sequence.counts != _started(forward.prefill):
            before = forward.segments.get(sum(after < index for after in self._stages))
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

    def _probes(
        self, forward: _Forward, index: int, inputs: LayerInputs
    ) -> dict[ProbeName, Callable[[], Probe]]:
        backbone, ran = self._backbone, forward.ran
        probes: dict[ProbeName, Callable[[], Probe]] = {"next": lambda: backbone.probe(index, inputs)}
        if index > 0:
            last = LayerInputs(inputs.hidden, inputs.valid, inputs.position_embeddings)
            probes["last"] = lambda: backbone.probe(index - 1, last)
        if ran is not None:
            probes["ran"] = lambda: backbone.probe(index - 1, ran)
        return probes


def forward_length(forward: _Forward, hidden: torch.Tensor) -> int:
    """Tokens of the conversation that a forward brings, the dropped ones included."""
    return hidden.shape[1] if forward.prefill is None else forward.prefill.record.valid.shape[1]


def _started(prefill: Prefill) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(image.tokens for image in sample) for sample in prefill.record.images)


def _last_columns(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    batch, length = hidden.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    return mask[:, -length:].bool()


def _uses_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    asked = kwargs.get("use_cache")
    return bool(getattr(config, "use_cache", True) if asked is None else asked)


def _device(hidden: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.device:
    tensor = kwargs.get("input_ids") if hidden is None else hidden
    return torch.device("cpu") if tensor is None else tensor.device


def _seed(ids: torch.Tensor) -> int:
    """One number for a prompt, from its tokens without padding: the same in any batch."""
    return zlib.crc32(ids.to(torch.int64).numpy().tobytes())


def _by_sample(flat: torch.Tensor, forward: _Forward) -> torch.Tensor:
    """Features ``(n, D)`` of the batch's visual tokens in order, as ``(B, N, D)``."""
    assert forward.prefill is not None
    there = forward.prefill.sequence.visual_valid.to(flat.device)
    out = flat.new_zeros(*there.shape, flat.shape[-1])
    out[there] = flat
    return out


def _added(hidden: torch.Tensor, features: torch.Tensor, sequence: Tokens) -> torch.Tensor:
    """Hidden states with the features of the visual tokens that are still there added."""
    place = sequence.origin[..., None].expand(-1, -1, features.shape[-1])
    here = features.to(hidden.device, hidden.dtype).gather(1, place.to(hidden.device))
    hidden = hidden.clone()
    hidden[sequence.visual] = hidden[sequence.visual] + here[sequence.visual_valid]
    return hidden


def _same_prompts(ids: torch.Tensor, last: torch.Tensor) -> bool:
    """Whether beams were only reordered: the same rows up to the tokens that beams add."""
    return ids.shape == last.shape and all(bool((row == last).all(1).any()) for row in ids)


def _forced(selection: Selection, images: Images, stages: Sequence[int]) -> dict[int, torch.Tensor]:
    """A user's selection as masks over the tokens at the start."""
    if len(selection) != len(stages):
        raise InputError(f"replay: found indices for {len(selection)} stages, the pipeline has {len(stages)}")
    most = max(sum(image.tokens for image in sample) for sample in images)
    masks = {}
    for number, by_sample in zip(sorted(stages), selection, strict=True):
        mask = torch.zeros(len(images), most, dtype=torch.bool)
        if len(by_sample) != len(images):
            raise InputError(f"replay: found indices for {len(by_sample)} samples, the forward brings {len(images)}")
        for sample, by_image in enumerate(by_sample):
            if len(by_image) != len(images[sample]):
                raise InputError(
                    f"replay: sample {sample}: found indices for {len(by_image)} images, it has {len(images[sample])}"
                )
            first = 0
            for image, indices in zip(images[sample], by_image, strict=True):
                places = torch.as_tensor(indices, dtype=torch.int64)
                if places.numel() and not (0 <= int(places.min()) and int(places.max()) < image.tokens):
                    raise InputError(
                        f"replay: sample {sample}: indices must lie between 0 and {image.tokens - 1}, found "
                        f"{int(places.min())} to {int(places.max())}"
                    )
                mask[sample, first + places] = True
                first += image.tokens
        masks[number] = mask
    return masks


def _cache_bytes(cache: Any) -> tuple[tuple[int, int], ...] | None:
    """For each layer the bytes that it holds, and what it would hold with every token of the conversation."""
    if cache is None:
        return None
    sizes = []
    for layer in getattr(cache, "layers", ()):
        held = 0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
        keys = layer.keys.shape[-2] if held else 1
        sizes.append((held, held // keys * int(layer.get_seq_length()) if held else 0))
    return tuple(sizes)
