"""The runtime: hooks on a stock model that run stages and serve every layer its own masks and positions."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trio.context import ProbeName
from trio.errors import AttachError, InputError, NonFiniteError
from trio.probe import LayerInputs, Probe
from trio.runtime.backbone import Backbone
from trio.runtime.cache import ReducedLayer, bytes_of, check_can_shrink
from trio.runtime.compress import BoundCompressor, EncoderSide, merged_features
from trio.runtime.forward import Forward
from trio.runtime.generate import GuardedGenerate
from trio.runtime.methods import NotedEncoder, StandIn
from trio.runtime.prefill import Selection, Uncached, given_tokens, start_prefill
from trio.runtime.record import PrefillRecord
from trio.runtime.sequence import NewlinePolicy
from trio.runtime.sequence import Sequence as Tokens
from trio.runtime.shrink import Shrinker
from trio.runtime.stage import BoundStage, Prefill, now, run_stage


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
        compressor: BoundCompressor | None = None,
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
            compressor: works on the encoder side, in front of the first decoder layer.
            on_prefill: told after each forward that brought visual tokens.
            on_decode: told the seconds of each other forward, where `full_report` is set.
        """
        self._backbone = backbone
        self._stages = {stage.after_layer: stage for stage in stages}
        self._encoder = None if compressor is None else EncoderSide(backbone, compressor)
        reductions = sorted({*self._stages, *(() if compressor is None else (0,))})
        self._first = min(reductions, default=0)
        self._needs_ran = {
            stage.after_layer - 1 for stage in stages if "ran" in stage.scorer.required() and stage.after_layer > 0
        }
        self._name = owner
        # Pipelines of one name may differ: what is written on caches also says where the stages stand.
        layers = ", ".join(map(str, self._stages)) or "none"
        before = "" if compressor is None else f"compressor {compressor.name}, "
        numbering = "compact" if compact else "original"
        self._owner = f"{owner} ({before}stages after layers {layers}, positions {numbering})"
        self._shrinker = Shrinker(backbone, reductions, owner=self._owner, compact=compact)
        self._full = full_report
        self._newlines = newlines
        self._on_prefill = on_prefill
        self._on_decode = on_decode
        self._handles: list[Any] = []
        self._stand_ins: list[StandIn] = []
        self._encoded: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        self._forward: Forward | None = None
        self._uncached: Uncached | None = None
        self._signature = inspect.signature(backbone.multimodal.forward)
        self.forced: Selection | None = None
        self.score_only = False

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    @property
    def reads_tower(self) -> bool:
        """Whether a compressor has to see the vision tower at work."""
        return self._encoder is not None and self._encoder.reads_tower

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
            GuardedGenerate(model, owner=self, name=self._name),
            *(
                NotedEncoder(
                    multimodal,
                    name,
                    pixels=self._backbone.pixels,
                    note=self._noting(modality),
                    done=self._encoding_done(modality),
                )
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
            if self._encoder is not None:
                self._encoder.attach()
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
        if self._encoder is not None:
            self._encoder.detach()
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
            if self._encoder is not None:
                self._encoder.begin()
            self._encoded[modality] = arguments
            forward = self._forward
            if forward is not None and forward.thread == threading.get_ident():
                forward.modalities.add(modality)

        return note

    def _encoding_done(self, modality: str) -> Callable[[], None]:
        def done() -> None:
            if self._encoder is not None:
                self._encoder.encoded(modality)

        return done

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
            forward.prefill = self._start(forward, hidden, uncached)
        elif hidden is None and not forward.call and kwargs.get("input_ids") is None:
            raise InputError("forward: the language model got neither input_ids nor inputs_embeds")
        forward.active = reduced or forward.prefill is not None
        if self._full:
            forward.begin = now(_device(hidden, kwargs))
        prefill = forward.prefill
        later = None if prefill is None else self._backbone.later_features(kwargs, self._first)
        if prefill is None or later is None:
            return None
        kwargs, features = later
        forward.features = {layer: _by_sample(flat, prefill) for layer, flat in features.items()}
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

    def _enter(self, module: nn.Module) -> Forward:
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
        self._forward = Forward(entry=module, thread=me)
        return self._forward

    # A forward that brings visual tokens

    def _start(self, forward: Forward, hidden: torch.Tensor, uncached: bool) -> Prefill | None:
        prefill = start_prefill(self._backbone, forward, hidden, self._encoded, self._newlines)
        if prefill is None:
            return None
        prefill.score_only, prefill.keep_saliency, prefill.clock = self.score_only, self._full, self._full
        if uncached:
            prefill.uncached = hidden[prefill.sequence.visual].detach()
        if self.forced is not None:
            prefill.forced = given_tokens(self.forced, prefill.record.images, [s.index for s in self._stages.values()])
        elif prefill.uncached is not None and self._uncached is not None:
            again = self._uncached.continued_by(prefill, prefill.uncached)
            prefill.forced = self._uncached.kept if again else None
            prefill.seeds = self._uncached.seeds if again else prefill.seeds
            prefill.repeats = again
        prefill.record.replayed = prefill.forced is not None
        return prefill

    def _finish(self, forward: Forward, output: Any) -> None:
        prefill = forward.prefill
        device = output[0].device if isinstance(output, tuple) else output.last_hidden_state.device
        if prefill is None:
            if self._full:
                self._on_decode(now(device) - forward.begin)
            return
        if prefill.finite:
            self._check_finite(prefill)
        record = prefill.record
        self._uncached = None
        record.fill_layers(prefill.num_layers, self._first)
        if self._full:
            record.seconds["prefill"] = now(device) - forward.begin
            cache = output[1] if isinstance(output, tuple) and len(output) > 1 else output.get("past_key_values")
            record.cache_bytes = bytes_of(cache)
        if prefill.uncached is not None and not prefill.score_only and self.forced is None:
            kept = {index: stage.kept for index, stage in record.stages.items()}
            self._uncached = Uncached(prefill.input_ids, prefill.uncached, kept, prefill.seeds)
        if not prefill.repeats:
            self._on_prefill(record)

    @staticmethod
    def _check_finite(prefill: Prefill) -> None:
        """Looks at the flags of all stages at once: the prefill's other synchronisation."""
        flags = torch.stack([finite.to(prefill.finite[-1][1].device) for _, finite in prefill.finite]).tolist()
        for (stage, _), finite in zip(prefill.finite, flags, strict=True):
            if not finite:
                raise NonFiniteError(
                    f"stage after layer {stage.after_layer}: the scorer {type(stage.scorer).__name__} gave saliencies "
                    "that are not finite; look at the hidden states: float16 may overflow (load the model in "
                    "bfloat16), or weights or pixels hold nan"
                )

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
        self, forward: Forward, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        prefill, cache = forward.prefill, kwargs.get("past_key_values")
        stage = self._stages.get(index)
        arrived = hidden
        if prefill is not None and index == 0 and self._encoder is not None and not prefill.score_only:
            hidden = self._compress(self._encoder, forward, prefill, hidden, cache)
        if prefill is not None:
            prefill.sequence = prefill.sequence.to(hidden.device)
        if prefill is not None and index in forward.features:
            hidden = _added(hidden, forward.features[index], prefill.sequence)
        if prefill is not None and stage is not None:
            check_can_shrink(cache, index, len(self._backbone.layers), self._owner)
            inputs = self._shrinker.inputs(forward, index, hidden, kwargs)
            columns = run_stage(stage, prefill, hidden, self._probes(forward, index, inputs))
            if columns is not None:
                forward.segments.clear()
                hidden = hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        forward.ran = None
        changed = self._shrinker.arguments(forward, index, hidden, kwargs)
        if prefill is not None and index in self._needs_ran:
            given = kwargs if changed is None else changed
            forward.ran = self._shrinker.inputs(forward, index, hidden, given, shrunk=True)
        if prefill is not None and index >= self._first:
            prefill.record.lengths.append(prefill.sequence.valid.shape[1])
            prefill.record.tokens.append(prefill.sequence.lengths)
        if changed is None:
            return None if hidden is arrived else (hidden, kwargs)
        return hidden, changed

    def _compress(
        self, encoder: EncoderSide, forward: Forward, prefill: Prefill, hidden: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Runs the compressor on the pictures that enter the language model."""
        check_can_shrink(cache, 0, len(self._backbone.layers), self._owner)
        prefill.sequence = prefill.sequence.to(hidden.device)
        with prefill.timed("compression", hidden.device):
            result = encoder.run(prefill, hidden)
        if result is None:
            return hidden
        hidden, columns = result
        assert prefill.record.compressed is not None
        forward.features = {
            layer: merged_features(features, prefill.record.compressed) for layer, features in forward.features.items()
        }
        return hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _probes(self, forward: Forward, index: int, inputs: LayerInputs) -> dict[ProbeName, Callable[[], Probe]]:
        backbone, ran = self._backbone, forward.ran
        probes: dict[ProbeName, Callable[[], Probe]] = {"next": lambda: backbone.probe(index, inputs)}
        if index > 0:
            last = LayerInputs(inputs.hidden, inputs.valid, inputs.position_embeddings)
            probes["last"] = lambda: backbone.probe(index - 1, last)
        if ran is not None:
            probes["ran"] = lambda: backbone.probe(index - 1, ran)
        return probes


def _uses_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    asked = kwargs.get("use_cache")
    return bool(getattr(config, "use_cache", True) if asked is None else asked)


def _device(hidden: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.device:
    tensor = kwargs.get("input_ids") if hidden is None else hidden
    return torch.device("cpu") if tensor is None else tensor.device


def _by_sample(flat: torch.Tensor, prefill: Prefill) -> torch.Tensor:
    """Features ``(n, D)`` of the batch's visual tokens in order, as ``(B, N, D)``."""
    there = prefill.sequence.visual_valid.to(flat.device)
    number = there.flatten().cumsum(0).view(there.shape) - 1  # places, without a look at the device
    return flat[number.clamp_min(0)].masked_fill(~there[..., None], 0)


def _added(hidden: torch.Tensor, features: torch.Tensor, sequence: Tokens) -> torch.Tensor:
    """Hidden states with the features of the visual tokens that are still there added."""
    width = features.shape[-1]
    here = features.to(hidden).gather(1, sequence.origin[..., None].expand(-1, -1, width))
    here = here.masked_fill(~sequence.visual_valid[..., None], 0)
    return hidden.scatter_add(1, sequence.visual_index[..., None].expand(-1, -1, width), here)
