"""The runtime: hooks on a stock model that run stages and serve every layer its own masks and positions."""

from __future__ import annotations

import inspect
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from ..core.backbone import FEATURE_COUNTS, Backbone
from ..core.context import ProbeName
from ..core.hooking import Hook, MethodPatch, Owner, patches_on, remove_hooks
from ..core.probe import LayerInputs, Probe
from ..core.transfer import HostValues
from ..core.upstream import LayerCall, ModelCall, Role, check_one_cache, hidden_of, unsupported, uses_cache
from ..errors import AttachError, BusyError, InputError, NonFiniteError
from .cache import ReducedLayer, bytes_of, check_can_shrink, check_filled, tokens_in
from .encoder_side import BoundCompressor, EncoderSide, merged_features
from .forward import Forward, Prefill, now
from .methods import GuardedGenerate, NotedEncoder
from .prefill import Selection, given_tokens, start_prefill
from .record import PrefillRecord
from .shrink import Shrinker
from .stage import BoundStage, run_stage
from .state import NewlinePolicy, TokenState
from .turns import Turn, frame_of, is_running, turns_of

#: Within these a forward and `generate` have their turn.
_FORWARD, _GENERATE = nn.Module._call_impl.__code__, GuardedGenerate.__call__.__code__


class _Running(threading.local):
    """What runs in this thread: torch.compile guards it by thread, so that nobody needs to ask for one.

    Attributes:
        forward: the running forward.
        generating: whether `generate` runs.
        appends: whether each of its steps adds tokens that are no padding.
        appends_to: the cache of its last forward.
        turn: with which this thread uses the model.
    """

    forward: Forward | None = None
    generating: bool = False
    appends: bool = False
    appends_to: Any = None
    turn: Turn | None = None


class Runtime:
    """Attaches stages to a model and takes them off again.

    The model's classes, modules and weights stay as they are: only hooks are added, and patches around `generate` and
    the encoder methods. They hold the runtime weakly: one that is garbage takes them with it.

    Attributes:
        within_encoder: whether an encoder method runs, see `Listener`.
        forced: tokens to keep in place of scored ones.
        score_only: score, but drop nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        stages: Sequence[BoundStage],
        *,
        pipeline_name: str,
        compact: bool,
        full_report: bool,
        newlines: NewlinePolicy = "with-row",
        compressor: BoundCompressor | None = None,
        wait: float = 0.0,
        on_prefill: Callable[[PrefillRecord], None],
        on_decode: Callable[[float], None],
    ) -> None:
        """Binds a runtime.

        Args:
            backbone: the model, through its adapter.
            stages: in order of their layers.
            pipeline_name: it is written on the caches that are reduced.
            compact: whether survivors are renumbered.
            full_report: keep saliencies, measure times and bytes.
            newlines: what happens to tokens that end the rows of an image.
            compressor: works on the encoder side, in front of the first decoder layer.
            wait: seconds that a thread waits for its turn while another uses the model.
            on_prefill: told after each forward that brought visual tokens.
            on_decode: told the seconds of each other forward, where `full_report` is set.

        Raises:
            UnsupportedModelError: this release of transformers calls the model's parts in a way that is not known.
        """
        self._backbone = backbone
        self._upstream = backbone.upstream
        self._stages = {stage.after_layer: stage for stage in stages}
        self._encoder = None if compressor is None else EncoderSide(backbone, compressor)
        reductions = sorted({*self._stages, *(() if compressor is None else (0,))})
        self._first = min(reductions, default=0)
        self._needs_ran = {
            stage.after_layer - 1 for stage in stages if "ran" in stage.scorer.required() and stage.after_layer > 0
        }
        # Pipelines of one name may differ: what is written on caches also says where the stages stand.
        layers = ", ".join(map(str, self._stages)) or "none"
        before = "" if compressor is None else f"compressor {compressor.name}, "
        numbering = "compact" if compact else "original"
        self._signature = f"{pipeline_name} ({before}stages after layers {layers}, positions {numbering})"
        self._shrinker = Shrinker(backbone, reductions, pipeline_name=self._signature, compact=compact)
        self._compact = compact
        self._full = full_report
        self._newlines = newlines
        self._on_prefill = on_prefill
        self._on_decode = on_decode
        encoders = [getattr(type(backbone.multimodal), name, None) for name in backbone.encoders.values()]
        self._encoder_arguments = sorted(
            {name for one in encoders if one for name in inspect.signature(one).parameters}
        )
        # Attached last and detached first, so that whatever an interrupt leaves on the model has no effect.
        self._owner = Owner(pipeline_name)
        self._encoded: dict[str, Mapping[str, Any]] = {}
        self._encoded_ahead: str | None = None
        self._looked_ahead: HostValues | None = None  # where images are encoded ahead of the forward
        self._wait = wait
        self._turns = turns_of(backbone.language_model)
        self._here: Turn | None = None  # of the thread for which alone it is attached
        self._claim: Forward | None = None  # the forward that runs
        self._claimed: FrameType | None = None  # the call of its entry
        self._running = _Running()
        self._uncached: Prefill | None = None
        self.within_encoder = False
        self.forced: Selection | None = None
        self.score_only = False
        weakref.finalize(self, _left_behind, weakref.ref(backbone.model), self._owner, self._encoder).atexit = False

    # Attaching

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model and at work, as this thread sees it."""
        return self._owner.attached

    @property
    def reads_tower(self) -> bool:
        """Whether a compressor has to see the vision tower at work."""
        return self._encoder is not None and self._encoder.reads_tower

    def attach(self, *, here: bool = False, wait: float | None = None) -> None:
        """Puts the hooks on the model.

        Args:
            here: they work for this thread alone, which has its turn until it detaches; others use the stock model.
            wait: seconds to wait for the turn; None: as the runtime was told.

        Raises:
            AttachError: this or another pipeline is attached already, or the model is in training mode.
            BusyError: another thread uses the model.
        """
        model = self._backbone.model
        self._check_free()
        if model.training:
            raise AttachError(
                f"attach: this {type(model).__name__} is in training mode; call model.eval() first: "
                "compression is for inference"
            )
        turn, owner = Turn(), self._owner
        try:
            self._wait_for(turn, self._wait if wait is None else wait)
            self._check_free()
            self._put_on(model)
            if here:
                self._here = self._running.turn = turn
                epoch = owner.epoch  # until it is detached, and `_release` has ended
                turn.used = lambda: owner.epoch is epoch
            owner.attach(here=here)
        except BaseException:
            self._turns.leave(turn)
            raise
        if not here:
            self._turns.leave(turn)

    def _put_on(self, model: nn.Module) -> None:
        """Hooks and patches, without effect yet."""
        _take_off(model, lambda owner: not owner.attached)  # what an interrupt left, of any pipeline
        self._release()
        try:
            self._hook(model, self._before_model)
            multimodal = self._backbone.multimodal
            self._hook(multimodal, self._before_multimodal, after=True)
            self._hook(self._backbone.language_model, self._before_language_model, after=True)
            for index, layer in enumerate(self._backbone.layers):
                if index >= self._first or index in self._needs_ran or self._compact:
                    self._hook(layer, self._before_layer, index)
            for patch in self._patches(model, multimodal):
                patch.install()
            if self._encoder is not None:
                self._encoder.attach(self._owner)
        except BaseException:
            self._release()
            raise

    def _check_free(self) -> None:
        model = self._backbone.model
        other = self._owner if self.attached else GuardedGenerate.owner_on(model)
        if other is not None:
            name = "this pipeline" if other is self._owner else f"the pipeline {other.name!r}"
            raise AttachError(
                f"attach: {name} is already attached to this {type(model).__name__}; detach it first "
                "(a `with` block does so at its end)"
            )

    def detach(self) -> None:
        """Takes everything off again; does nothing where nothing is attached.

        Raises:
            InputError: the model is in the middle of a forward, or works for another thread alone.
        """
        running = self._claimed is not None and is_running(self._claimed)
        elsewhere = self._here is not None and not self._here.mine and not self._here.is_over
        if running or elsewhere:
            raise InputError(
                "detach: the model is in the middle of a forward or of another thread's call, whose cache and masks "
                "the pipeline serves; detach when it has ended"
            )
        self._release()

    def detach_here(self) -> None:
        """Detaches where it is attached for this thread alone, also where attaching did not come to its end."""
        if self._here is not None and self._here.mine:
            self.detach()

    def _release(self) -> None:
        if self._here is not None:
            self._here.frame = sys._getframe()
        self._owner.detach()
        owner = self._owner
        _take_off(self._backbone.model, lambda other: other is owner)
        if self._encoder is not None:
            self._encoder.detach()
        self._claim = self._claimed = None
        self._running = _Running()
        self._uncached = None
        self._encoded.clear()
        self._encoded_ahead, self._looked_ahead, self.within_encoder = None, None, False
        if self._here is not None:
            turn, self._here = self._here, None
            self._turns.leave(turn)

    # Taking turns

    @contextmanager
    def turn(self, *, code: CodeType | None = None, receiver: Any = None, wait: float | None = None) -> Iterator[None]:
        """This thread's turn to use the model, for the block; nothing where it has it already.

        Args:
            code: a function within which the block runs, see `Turn`.
            receiver: the `self` of that function.
            wait: seconds to wait; None: as the runtime was told.

        Raises:
            BusyError: it was not this thread's turn in that time.
        """
        if self._has_turn():
            yield
            return
        turn, running = Turn(code, None if code is None else frame_of(code, receiver)), self._running
        try:
            self._wait_for(turn, self._wait if wait is None else wait)
            running.turn = turn
            yield
        finally:
            turn.used = bool  # not any more
            running.turn = None
            self._turns.leave(turn)

    def _has_turn(self) -> bool:
        turn = self._running.turn  # one of a forward is of one that was interrupted
        return turn is not None and turn.code is not _FORWARD and self._turns.has(turn) and not turn.is_over

    def _wait_for(self, turn: Turn, seconds: float) -> None:
        if self._turns.wait(turn, seconds):
            return
        name = type(self._backbone.model).__name__
        if seconds == 0:
            raise BusyError(
                f"forward: another thread is running this {name}; a pipeline serves one thread at a time: build it "
                "with wait=True (or seconds) to take turns, or load a model for each thread"
            )
        raise BusyError(
            f"forward: another thread is still running this {name} after {seconds:g} seconds of waiting, and one "
            f"thread at a time is served ({self._turns.waiting} in the queue); wait longer, or take in fewer requests"
        )

    def _hook(self, module: nn.Module, before: Callable[..., Any], *bound: Any, after: bool = False) -> None:
        module.register_forward_pre_hook(Hook(before, *bound, owner=self._owner), with_kwargs=True)
        if after:
            module.register_forward_hook(Hook(self._after, owner=self._owner), always_call=True)

    def _patches(self, model: nn.Module, multimodal: nn.Module) -> list[MethodPatch]:
        backbone = self._backbone
        return [
            GuardedGenerate(model, listener=self, owner=self._owner),
            *(
                NotedEncoder(
                    multimodal, name, modality=modality, pixels=backbone.pixels, listener=self, owner=self._owner
                )
                for modality, name in backbone.encoders.items()
            ),
        ]

    # Around the model

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            raise InputError(
                f"forward: the {type(module).__name__} was put into training mode; call model.eval(), "
                "or detach the pipeline to train"
            )
        call = self._upstream.model
        given = call.given(args, kwargs)
        if call.read(Role.LABELS, given) is not None:
            raise InputError(
                "labels: dropped tokens have no logits, so a loss against labels would be misaligned; "
                "detach the pipeline to compute losses"
            )
        if isinstance(call.read(Role.LOGITS_TO_KEEP, given), torch.Tensor):
            raise InputError(
                "logits_to_keep: found a tensor of columns, which would count dropped tokens; pass a number of last "
                "columns instead"
            )

    def _before_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._enter(module)
        call = self._upstream.multimodal
        forward.call = call.given(args, kwargs)
        forward.brings_images = self._backbone.brings_images(forward.call)
        ahead, self._encoded_ahead = self._encoded_ahead, None
        if ahead is not None and not forward.brings_images:
            raise unsupported(
                f"{call.where}.forward",
                f"the {ahead} features that `generate` had encoded",
                f"a call with {', '.join(name for name, value in forward.call.items() if value is not None)}",
            )
        ids, embeddings = call.read(Role.IDS, forward.call), call.read(Role.EMBEDDINGS, forward.call)
        if ids is None and (forward.brings_images or embeddings is not None):
            raise InputError(
                "inputs_embeds: without input_ids nobody can tell which embeddings are visual tokens; "
                "pass input_ids and pixels, or detach the pipeline"
            )
        if forward.brings_images and not torch.compiler.is_compiling():
            self._look(forward, ids)

    def _look(self, forward: Forward, ids: Any) -> None:
        """Looks at all that the host must know, before the vision tower is launched: nothing is waited for yet."""
        mask = self._upstream.multimodal.read(Role.MASK, forward.call)
        given = [ids, mask, *(forward.call.get(name) for name in self._encoder_arguments)]
        tensors = [one for one in given if isinstance(one, torch.Tensor) and one.ndim == 2]
        forward.looked, self._looked_ahead = self._looked_ahead or HostValues(), None
        forward.looked.look([one for one in tensors if not one.is_floating_point()])
        if self._encoder is not None:
            self._encoder.looked(forward.looked)

    def encoding(self, modality: str, arguments: Mapping[str, Any]) -> None:
        """See `Listener`."""
        if self._encoder is not None:
            self._encoder.begin()
        self._encoded[modality] = arguments
        forward = self._running.forward
        if forward is not None:
            forward.modalities.add(modality)
        elif self._running.generating:
            self._encoded_ahead = modality
            if self._encoder is not None:
                self._looked_ahead = self._looked_ahead or HostValues()
                self._encoder.looked(self._looked_ahead)

    def encoded(self, modality: str, counts: tuple[int, ...] | None) -> None:
        """See `Listener`."""
        if counts is not None:
            self._encoded[modality] = {**self._encoded[modality], FEATURE_COUNTS: counts}
        if self._encoder is not None:
            self._encoder.encoded(modality)

    @contextmanager
    def generating(self, guard: MethodPatch, *, appends: bool) -> Iterator[None]:
        """See `Listener`."""
        with self.turn(code=_GENERATE, receiver=guard):
            try:
                self._generates(True, appends)
                yield
            finally:
                self._generates(False, False)

    def _generates(self, generating: bool, appends: bool) -> None:
        self._encoded_ahead = self._looked_ahead = None
        self._running.generating, self._running.appends, self._running.appends_to = generating, appends, None

    def _before_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self._enter(module)
        forward.reached = True
        call, depth = self._upstream.language_model, len(self._backbone.layers)
        given = call.given(args, kwargs)
        hidden, mask = call.read(Role.EMBEDDINGS, given), call.read(Role.MASK, given)
        cache = call.read(Role.CACHE, given)
        reduced = any(isinstance(layer, ReducedLayer) for layer in getattr(cache, "layers", ()))
        if forward.brings_images or reduced:
            stray = call.stray_cache(given)
            if stray is not None:
                raise unsupported(f"{call.where}.forward", f"the {Role.CACHE} as `{call.names[Role.CACHE]}`", stray)
            check_can_shrink(cache, self._first, depth, self._signature)
            if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
                raise InputError(
                    f"{call.names[Role.MASK]}: found a prepared mask that is not 2-D, which cannot shrink with the "
                    "tokens; pass the (batch, length) mask of the processor"
                )
            forward.past = tokens_in(cache, depth)
        # What `generate` adds behind its first forward is no padding: nobody has to look at the mask.
        forward.appended = cache is not None and cache is self._running.appends_to and not forward.brings_images
        forward.mask = None if forward.appended else mask
        forward.positions = call.read(Role.POSITIONS, given)
        forward.cache = cache
        forward.asks_cache = cache is not None or uses_cache(call, given, self._backbone.text_config)
        if forward.brings_images and hidden is None:
            raise unsupported(
                f"{call.where}.forward",
                f"the {Role.EMBEDDINGS} as `{call.names[Role.EMBEDDINGS]}`",
                f"a call with {', '.join(name for name, value in given.items() if value is not None)}",
            )
        if forward.brings_images and hidden is not None:
            forward.prefill = self._start(forward, hidden, not forward.asks_cache)
        elif hidden is None and not forward.call and call.read(Role.IDS, given) is None:
            raise InputError("forward: the language model got neither input_ids nor inputs_embeds")
        forward.active = reduced or forward.prefill is not None
        if self._full:
            forward.begin = now(_device(hidden, given))
        prefill = forward.prefill
        if reduced and prefill is None:
            return self._with_positions(forward, call, given)
        later = None if prefill is None else self._backbone.later_features(given, self._first)
        if prefill is None or later is None:
            return None
        kwargs, features = later
        forward.features = {layer: _by_sample(flat, prefill) for layer, flat in features.items()}
        return (), kwargs

    def _with_positions(
        self, forward: Forward, call: ModelCall, given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The language model's arguments with position ids for layers behind all reductions, where they differ."""
        name, entering = call.names.get(Role.POSITIONS), call.read(Role.EMBEDDINGS, given)
        entering = call.read(Role.IDS, given) if entering is None else entering
        stacked = None if name is None or entering is None else self._shrinker.stack_positions(forward, entering)
        return None if stacked is None else ((), {**given, str(name): stacked})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._running.forward
        if forward is None:
            return
        failed = output is None
        try:
            if not failed and module is self._backbone.language_model:
                self._finish(forward, output)
            elif not failed and forward.brings_images and not forward.reached:
                raise unsupported(
                    type(module).__name__,
                    f"a call of its {type(self._backbone.language_model).__name__} as a module",
                    "none, so that no token was dropped",
                )
        except BaseException:
            failed = True
            raise
        finally:
            if module is forward.entry or failed:
                self._running.forward = None
                if forward is self._claim:
                    self._claim = self._claimed = None
                    self._leave()

    def _enter(self, module: nn.Module) -> Forward:
        """The running forward, or a new one; a second thread waits or is refused.

        A traced forward claims nothing: it shares no state with another thread, and locks cannot be traced.
        """
        running = self._running.forward
        if running is not None and running.entry is not module:
            return running
        forward = Forward(entry=module)
        if not torch.compiler.is_compiling():
            self._take(forward)
        self._running.forward = forward
        return forward

    def _take(self, forward: Forward) -> None:
        """Takes a turn for a forward of this thread, where it has none; an interrupted forward has left its own."""
        if not self._has_turn():
            turn = Turn(_FORWARD, frame_of(_FORWARD, forward.entry))
            self._wait_for(turn, self._wait)
            self._running.turn = turn
        self._claim, self._claimed = forward, frame_of(_FORWARD, forward.entry)

    def _leave(self) -> None:
        """Ends the turn of a forward that has ended, where it took one."""
        turn = self._running.turn
        if turn is not None and turn.code is _FORWARD:
            self._running.turn = None
            self._turns.leave(turn)

    # A forward that brings visual tokens

    def _start(self, forward: Forward, hidden: torch.Tensor, uncached: bool) -> Prefill | None:
        prefill = start_prefill(self._backbone, forward, hidden, self._encoded, self._newlines)
        if prefill is None:
            return None
        prefill.score_only, prefill.keep_saliency, prefill.clock = self.score_only, self._full, self._full
        if uncached:
            prefill.embeddings = hidden[prefill.state.visual].detach()
        if self.forced is not None:
            prefill.forced = given_tokens(self.forced, prefill.record.images, [s.index for s in self._stages.values()])
        elif self._uncached is not None and prefill.continues(self._uncached):
            prefill.repeat(self._uncached)
        prefill.record.replayed = prefill.forced is not None
        return prefill

    def _finish(self, forward: Forward, output: Any) -> None:
        prefill = forward.prefill
        if forward.active:
            self._verify(forward)
        running = self._running
        if running.appends and running.appends_to is not forward.cache:
            running.appends_to = forward.cache
        device = hidden_of(output, self._upstream.language_model.where).device if self._full or forward.active else None
        if prefill is None:
            if self._full and device is not None:
                self._on_decode(now(device) - forward.begin)
            return
        if prefill.finite:
            self._check_finite(prefill)
        record = prefill.record
        self._uncached = None
        record.fill_layers(prefill.num_layers, self._first)
        if self._full:
            assert device is not None
            record.seconds["prefill"] = now(device) - forward.begin
            record.cache_bytes = bytes_of(forward.cache)
        if prefill.embeddings is not None and not prefill.score_only and self.forced is None:
            self._uncached = prefill
        if not prefill.repeats:
            self._on_prefill(record)

    def _verify(self, forward: Forward) -> None:
        """Compares what ran with what was planned: plain integers that the host has anyway.

        Raises:
            UnsupportedModelError: a decoder layer was left out or called twice.
            CacheError: a layer's keys went somewhere else.
        """
        depth = len(self._backbone.layers)
        if forward.visited != depth - self._first:
            raise unsupported(
                type(self._backbone.language_model).__name__,
                f"one call of each of its decoder layers {self._first} to {depth - 1}",
                f"{forward.visited} calls",
            )
        if forward.cache is not None and not (forward.prefill is not None and forward.prefill.score_only):
            brought = forward.brought
            check_filled(forward.cache, depth, forward.past + brought)

    @staticmethod
    def _check_finite(prefill: Prefill) -> None:
        """Looks at the flags of all stages at once: the prefill's other synchronisation."""
        last = prefill.finite[-1][1][0].device
        bounds = torch.stack([bound.float().to(last) for _, both in prefill.finite for bound in both]).tolist()
        for number, (stage, _) in enumerate(prefill.finite):
            if not all(map(math.isfinite, bounds[2 * number : 2 * number + 2])):
                raise NonFiniteError(
                    f"stage after layer {stage.after_layer}: the scorer {type(stage.scorer).__name__} gave saliencies "
                    "that are not finite; look at the hidden states: float16 may overflow (load the model in "
                    "bfloat16), or weights or pixels hold nan"
                )

    # Decoder layers

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self._running.forward
        if forward is None or not forward.active:
            return None
        call = self._upstream.layers[index]
        given = call.given(args, kwargs)
        hidden = given.get(call.hidden)
        if not isinstance(hidden, torch.Tensor):
            raise unsupported(
                f"{call.where}.forward", f"the {Role.HIDDEN} as `{call.hidden}`", f"a call with {', '.join(given)}"
            )
        self._meet_cache(forward, call, given)
        changed = self._at_layer(forward, index, hidden, given)
        if changed is None:
            return None
        hidden, given = changed
        given.pop(call.hidden, None)
        return ((hidden,), given) if args else ((), {**given, call.hidden: hidden})

    @staticmethod
    def _meet_cache(forward: Forward, call: LayerCall, given: Mapping[str, Any]) -> None:
        """Takes the cache that a layer was given for the forward's.

        Raises:
            UnsupportedModelError: the forward keeps keys and values, but the layer got no cache under a known name.
            InputError: another cache than before.
        """
        cache = call.read(Role.CACHE, given)
        if cache is None:
            if forward.asks_cache:
                arguments = [name for name, value in given.items() if value is not None]
                raise unsupported(
                    f"{call.where}.forward",
                    f"the {Role.CACHE} as `{call.cache}`",
                    f"a call with {', '.join(arguments)}",
                )
            return
        check_one_cache(forward.cache, cache)
        forward.cache = cache

    def _at_layer(
        self, forward: Forward, index: int, hidden: torch.Tensor, given: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]] | None:
        prefill, cache = forward.prefill, forward.cache
        stage = self._stages.get(index)
        arrived = hidden
        if index >= self._first:
            forward.visited += 1
        if forward.visited <= 1:
            forward.brought = forward.tokens(hidden)
        if prefill is not None and index == 0 and self._encoder is not None and not prefill.score_only:
            hidden = self._compress(self._encoder, forward, prefill, hidden, cache)
        if prefill is not None:
            prefill.state = prefill.state.to(hidden.device)
        if prefill is not None and index in forward.features:
            hidden = _added(hidden, forward.features[index], prefill.state)
        if prefill is not None and stage is not None:
            check_can_shrink(cache, index, len(self._backbone.layers), self._signature)
            inputs = self._shrinker.inputs(forward, index, hidden, given)
            columns = run_stage(stage, prefill, hidden, self._probes(forward, index, inputs))
            if columns is not None:
                forward.segments.clear()
                hidden = hidden.gather(1, columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
        forward.ran = None
        changed = self._shrinker.arguments(forward, index, hidden, given)
        if prefill is not None and index in self._needs_ran:
            now_given = given if changed is None else changed
            forward.ran = self._shrinker.inputs(forward, index, hidden, now_given, shrunk=True)
        if prefill is not None and index >= self._first:
            prefill.record.layer_lengths.append(prefill.state.valid.shape[1])
            prefill.record.layer_tokens.append(prefill.state.sample_lengths)
        if changed is None:
            return None if hidden is arrived else (hidden, given)
        return hidden, changed

    def _compress(
        self, encoder: EncoderSide, forward: Forward, prefill: Prefill, hidden: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Runs the compressor on the images that enter the language model."""
        check_can_shrink(cache, 0, len(self._backbone.layers), self._signature)
        prefill.state = prefill.state.to(hidden.device)
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
            last = replace(inputs, past=None)
            probes["last"] = lambda: backbone.probe(index - 1, last)
        if ran is not None:
            probes["ran"] = lambda: backbone.probe(index - 1, ran)
        return probes


def _take_off(model: nn.Module, owned: Callable[[Owner], bool]) -> None:
    """Takes hooks and patches off a model."""
    remove_hooks(model, lambda module, n, hook: isinstance(hook, Hook) and hook.owner is not None and owned(hook.owner))
    for patch in list(patches_on(model)):
        if owned(patch.owner):
            patch.remove()


def _left_behind(model: weakref.ref[nn.Module], owner: Owner, encoder: EncoderSide | None) -> None:
    """A runtime is garbage: what it put on its model goes too."""
    was_attached = owner.attached
    owner.detach()
    living_model = model()
    if living_model is not None:
        _take_off(living_model, lambda other: other is owner)
        if encoder is not None:
            encoder.detach()
    if was_attached:
        warnings.warn(
            f"the pipeline {owner.name!r} was attached when the last reference to it went, so that it was taken off "
            "its model; keep the pipeline in a variable while it is to work",
            RuntimeWarning,
            stacklevel=2,
        )


def _device(hidden: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.device:
    tensor = next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None) if hidden is None else hidden
    return torch.device("cpu") if tensor is None else tensor.device


def _by_sample(flat: torch.Tensor, prefill: Prefill) -> torch.Tensor:
    """Features ``(n, D)`` of the batch's visual tokens in order, as ``(B, N, D)``."""
    valid = prefill.state.visual_valid.to(flat.device)
    row = valid.flatten().cumsum(0).view(valid.shape) - 1  # computed, so that the host need not wait for the device
    return flat[row.clamp_min(0)].masked_fill(~valid[..., None], 0)


def _added(hidden: torch.Tensor, features: torch.Tensor, state: TokenState) -> torch.Tensor:
    """Hidden states with the features of the visual tokens that are still there added."""
    width = features.shape[-1]
    here = features.to(hidden).gather(1, state.token_index[..., None].expand(-1, -1, width))
    here = here.masked_fill(~state.visual_valid[..., None], 0)
    return hidden.scatter_add(1, state.visual_index[..., None].expand(-1, -1, width), here)
