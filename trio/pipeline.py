"""A spec bound to a model: attached, the model compresses; detached, the model is as before."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from .adapters import adapter_for
from .adapters.base import ADAPTERS, Adapter
from .core.tokens import Signal
from .encoders.compressors.base import COMPRESSORS, Compressor
from .encoders.resizing import resizing_processor
from .errors import InputError, SpecError, UnsupportedModelError
from .report import CompressionReport
from .report.build import make_report, saliencies
from .runtime.canary import check_release
from .runtime.encoder_side import BoundCompressor
from .runtime.hooks import Runtime
from .runtime.prefill import Selection
from .runtime.record import PrefillRecord
from .runtime.stage import BoundStage
from .runtime.turns import seconds_of
from .scorers.base import SCORERS, Scorer
from .selectors.base import SELECTORS, Selector
from .spec import Budget, CompressorSpec, PipelineSpec, StageSpec, load_spec
from .spec.schedule import resolve

#: Reports that a pipeline remembers; older ones are forgotten.
REMEMBERED = 64


class Pipeline:
    """A spec bound to a model.

    Used as a context manager, or through `attach` and `detach`. While attached, every forward of the model that brings
    images is compressed, `generate` included; nothing else about the model changes.

    Example:
        ```python
        pipeline = trio.Pipeline.from_spec("trio-llava-1.5-64", model)
        with pipeline:
            out = model.generate(**inputs, max_new_tokens=64)
        print(pipeline.report.summary())
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stages: Sequence[StageSpec | Mapping[str, Any]] = (),
        compressor: CompressorSpec | Mapping[str, Any] | str | None = None,
        resize: int | str | None = None,
        positions: Literal["auto", "compact", "original"] = "original",
        newlines: Literal["with-row", "always", "never"] = "with-row",
        budget: Budget | Mapping[str, Any] | None = None,
        name: str = "custom",
        report: Literal["counts", "full"] = "counts",
        adapter: Adapter | None = None,
        spec: PipelineSpec | None = None,
        wait: bool | float = False,
    ) -> None:
        """Builds a pipeline from parts; `from_spec` builds one from a spec.

        Args:
            model: a transformers vision-language model (or a PEFT wrapper around one), in evaluation mode.
            stages: reductions inside the language model, in order of their layers.
            compressor: the reduction on the encoder side.
            resize: what images become in front of the processor, see `processor`.
            positions: numbering of the survivors: each its own, gapless, or (``auto``) as in the family's published
                code.
            newlines: what happens to tokens that end the rows of a tiled image.
            budget: a promise about the average that is checked.
            name: what reports call the pipeline.
            report: ``counts`` costs nothing; ``full`` keeps saliencies and measures times and bytes.
            adapter: in place of the one found for the model.
            spec: a whole spec in place of the parts.
            wait: what a thread does while another uses the attached model: False refuses it (`BusyError`), True lets
                it wait for its turn, first come, first served, a number says for how many seconds at most.

        Raises:
            SpecError: parts that contradict each other or do not fit the model's depth, or a spec and parts.
            UnsupportedModelError: no adapter takes the model, or a part needs what the model does not offer.
            UnknownNameError: a part of that name does not exist.
            InputError: `wait` is no number of seconds.
        """
        given = (tuple(stages), compressor, resize, positions, newlines, budget, name)
        if spec is not None and given != ((), None, None, "original", "with-row", None, "custom"):
            raise SpecError(
                "pipeline: found a spec and parts (stages, compressor, resize, positions, newlines, budget or name), "
                "which would be ignored; give one or the other: spec.model_copy(update=...) changes a spec"
            )
        if spec is None:
            fields: dict[str, Any] = {"stages": list(stages), "positions": positions, "newlines": newlines}
            fields |= {"name": name, "resize": resize}
            if compressor is not None:
                fields["compressor"] = compressor
            if budget is not None:
                fields["budget"] = budget
            spec = PipelineSpec(**fields)
        self.spec = spec
        self.adapter = adapter_for(model) if adapter is None else adapter
        self.schedule = resolve(spec, len(self.adapter.layers))
        self._check_resize()
        self._compressor = None if spec.compressor is None else self._bind_compressor(spec.compressor)
        self.positions = self._numbering()
        self._level: Literal["counts", "full"] = report
        self._bound = tuple(self._bind(index, stage) for index, stage in enumerate(spec.stages))
        self._records: deque[PrefillRecord] = deque(maxlen=REMEMBERED)
        self._runtime = Runtime(
            self.adapter,
            self._bound,
            pipeline_name=spec.name,
            compact=self.positions == "compact",
            full_report=report == "full",
            newlines=spec.newlines,
            compressor=self._compressor,
            wait=seconds_of(wait),
            # Neither holds the pipeline: one that nobody refers to goes, and takes its hooks along.
            on_prefill=self._records.append,
            on_decode=functools.partial(_decoded, self._records),
        )

    @classmethod
    def from_spec(
        cls,
        spec: str | Path | Mapping[str, Any] | PipelineSpec,
        model: nn.Module,
        *,
        report: Literal["counts", "full"] = "counts",
        adapter: Adapter | None = None,
        wait: bool | float = False,
    ) -> Self:
        """Builds a pipeline from a shipped spec's name, a path, a mapping or a `PipelineSpec`; see `__init__`."""
        return cls(model, spec=load_spec(spec), report=report, adapter=adapter, wait=wait)

    # Attaching

    def attach(self) -> Self:
        """Attaches the pipeline to its model.

        Raises:
            AttachError: a pipeline is attached already, or the model is in training mode.
            BusyError: a call of another thread compresses on this model, see `wait`.
            UnsupportedModelError: transformers is newer than the tests, and a promise does not hold on a tiny model.
        """
        check_release(self.adapter)
        self._runtime.attach()
        return self

    def detach(self) -> None:
        """Takes everything off the model again; does nothing where the pipeline is not attached."""
        self._runtime.detach()

    @property
    def attached(self) -> bool:
        """Whether the pipeline is attached, for all threads or for this one."""
        return self._runtime.attached

    @property
    def reads_tower(self) -> bool:
        """Whether its compressor has to see the vision tower at work: remembered features are then not enough."""
        return self._runtime.reads_tower

    def __enter__(self) -> Self:
        """Attaches."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detaches, also after an error."""
        self.detach()

    # A call of its own

    @contextmanager
    def in_this_thread(self, *, wait: bool | float = True) -> Iterator[Self]:
        """Attached for the block and for the calling thread alone; other threads use the model as it is, meanwhile.

        Threads that enter on one model, with whatever pipelines, are served one after another, in the order in which
        they asked. Within the block the last report is of the block's own call. Where the pipeline is attached already,
        the block is this thread's turn.

        Args:
            wait: True waits for the turn, a number for at most that many seconds, False refuses at once.

        Raises:
            BusyError: it was not this thread's turn in that time.
            AttachError: another pipeline is attached for all threads or for this one, or the model is in training
                mode.
        """
        seconds = seconds_of(wait)
        if self.attached:
            with self._runtime.turn(wait=seconds):
                yield self
            return
        check_release(self.adapter)
        try:
            self._runtime.attach(here=True, wait=seconds)
            yield self
        finally:
            self._runtime.detach_here()

    def generate(self, *args: Any, wait: bool | float = True, **kwargs: Any) -> Any:
        """Compresses this call of `model.generate` alone, whatever other threads do; see `in_this_thread`.

        Args:
            args: of the model's `generate`.
            wait: True waits until the model is free, a number for at most that many seconds, False refuses at once.
            kwargs: of the model's `generate`.

        Returns:
            What the model's `generate` returns.

        Raises:
            BusyError: it was not this thread's turn in that time.
        """
        with self.in_this_thread(wait=wait):
            model: Any = self.adapter.model
            return model.generate(*args, **kwargs)

    # In front of the model

    def processor(self, processor: Any) -> Any:
        """The processor to make this pipeline's inputs with: where the spec has `resize`, a copy that resizes images.

        The pipeline itself sees what a processor gives, and cannot know whether the images were resized.

        Args:
            processor: of the model.

        Returns:
            The same processor where the spec has no `resize`.

        Raises:
            InputError: the processor is of a kind that is not known.
        """
        return processor if self.spec.resize is None else resizing_processor(processor, self.spec.resized)

    # Reports

    @property
    def report(self) -> CompressionReport:
        """What the last prefill did.

        Raises:
            InputError: no forward with an image has run yet.
        """
        if not self._records:
            raise InputError(
                "report: nothing to report yet; run a forward with an image while the pipeline is attached"
            )
        return self._report(self._records[-1])

    @property
    def reports(self) -> list[CompressionReport]:
        """What the last prefills did, oldest first (at most 64)."""
        return [self._report(record) for record in self._records]

    # Without dropping, and with given tokens

    def score(self, inputs: Mapping[str, Any]) -> list[list[torch.Tensor]]:
        """Saliencies without dropping anything.

        Args:
            inputs: what the model's forward takes, with images.

        Returns:
            For each stage, for each sample: float32 ``(n,)`` on the CPU, one number for each of its visual tokens.
        """
        with self._once(score_only=True), torch.no_grad():
            self.adapter.model(**inputs)
        record = self._records.pop()
        return [saliencies(record, stage.index) for stage in self._bound]

    @contextmanager
    def replay(self, indices: Selection | CompressionReport) -> Iterator[Self]:
        """Drops given tokens in place of scored ones: for oracles, ablations and saved runs.

        Args:
            indices: for each stage, each sample and each image the tokens to keep, as places among the image's own
                tokens; or a report, whose selection is repeated.
        """
        selection = indices.selection() if isinstance(indices, CompressionReport) else indices
        with self._once(forced=selection):
            yield self

    @contextmanager
    def _once(self, *, forced: Selection | None = None, score_only: bool = False) -> Iterator[None]:
        """Attached for the block (or already), in another mode."""
        mine = not self.attached
        if mine:
            self.attach()
        self._runtime.forced, self._runtime.score_only = forced, score_only
        try:
            yield
        finally:
            self._runtime.forced, self._runtime.score_only = None, False
            if mine:
                self.detach()

    # Building

    @property
    def adapter_name(self) -> str:
        """The registered name of the adapter, or its class's."""
        return ADAPTERS.name_of(type(self.adapter)) or type(self.adapter).__name__

    def _check_resize(self) -> None:
        """Refuses `resize` where an image's size does not say how many tokens it has."""
        if self.spec.resize is None or self.adapter.image_tokens == "by-size":
            return
        model = type(self.adapter.model).__name__
        why = (
            "gives every image the same number of tokens, whatever its size"
            if self.adapter.image_tokens == "one"
            else f"counts an image's tokens by a rule that the adapter {self.adapter_name!r} does not describe"
        )
        raise UnsupportedModelError(
            f"resize: found {self.spec.resize!r}, but {model} {why}; leave `resize` out, or take what comes nearest: "
            "compressor: {name: average-pool, keep: ...}"
        )

    def _numbering(self) -> Literal["compact", "original"]:
        numbering = self.adapter.default_positions if self.spec.positions == "auto" else self.spec.positions
        if numbering not in self.adapter.allowed_positions:
            allowed = " or ".join(sorted(self.adapter.allowed_positions))
            raise UnsupportedModelError(
                f"positions: {numbering!r} does not work on {type(self.adapter.model).__name__}, whose positions have "
                f"rows and columns; use {allowed}"
            )
        return numbering

    def _bind(self, index: int, stage: StageSpec) -> BoundStage:
        scorer: Scorer = SCORERS.build(stage.scorer)
        selector: Selector = SELECTORS.build(stage.selector)
        after = self.schedule.layers[index]
        self._check_offers(index, after, scorer)
        return BoundStage(
            index=index,
            after_layer=after,
            scorer=scorer,
            selector=selector,
            per=self.schedule.group(index),
            keep_count=self._counter(index),
        )

    def _bind_compressor(self, spec: CompressorSpec) -> BoundCompressor:
        compressor: Compressor = COMPRESSORS.build(spec)
        name = COMPRESSORS.name_of(type(compressor)) or type(compressor).__name__
        if compressor.decides_count != (spec.keep is None):
            raise SpecError(
                f"compressor: {name!r} decides its own count; leave out `keep`"
                if compressor.decides_count
                else f"compressor.keep: missing; {name!r} leaves as many tokens as it is told: give a count or a share"
            )
        self._check_signals(spec, compressor, name)
        return BoundCompressor(
            name=name,
            compressor=compressor,
            per=self.schedule.compressor_group(),
            split=spec.split,
            keep_count=functools.cache(self.schedule.compressed_count),
        )

    def _check_signals(self, spec: CompressorSpec, compressor: Compressor, name: str) -> None:
        """Refuses a compressor or a split that needs what the model's encoder side does not give."""
        model = type(self.adapter.model).__name__
        offers = self.adapter.tower_offers()
        missing = sorted({signal.kind for signal in compressor.reads()} - offers)
        if missing:
            fitting = [n for n in COMPRESSORS.names() if {signal.kind for signal in _reads(n)} <= offers]
            raise UnsupportedModelError(
                f"compressor: {name!r} reads {', '.join(missing)} off the vision tower, which the adapter "
                f"{self.adapter_name!r} cannot give for this {model}; compressors that fit: "
                f"{', '.join(fitting) or 'none'}"
            )
        if spec.split == "saliency" and not (self.adapter.whole_beside_tiles and "attention" in offers):
            raise UnsupportedModelError(
                "compressor.split: saliency needs the whole image beside its tiles and the tower's attention, which "
                f"this {model} does not give (adapter {self.adapter_name!r}); use split: even"
            )

    def _counter(self, index: int) -> Callable[[int, int], int]:
        schedule = self.schedule
        by_image = all(schedule.group(i) == "image" for i in range(len(self.spec.stages)))
        check = functools.cache(schedule.check)

        def keep_count(started: int, current: int) -> int:
            if by_image:
                check(started)
            return schedule.keep_count(index, started, current)

        return keep_count

    def _check_offers(self, index: int, after: int, scorer: Scorer) -> None:
        needs = scorer.required()
        name = SCORERS.name_of(type(scorer)) or type(scorer).__name__
        if after == 0 and needs & {"ran", "last"}:
            raise UnsupportedModelError(
                f"stages[{index}].scorer: {name!r} looks at the layer that has just run, and after_layer is 0; "
                "use after_layer: 1 or more"
            )
        probed = after - 1 if needs & {"ran", "last"} else after
        offers = self.adapter.offers(probed) | {"ran", "last"}
        missing = sorted(needs - offers)
        if missing:
            fitting = [n for n in SCORERS.names() if _needs(n) <= offers]
            reasons = "; ".join(dict.fromkeys(self.adapter.why_not(probed, need) for need in missing))
            raise UnsupportedModelError(
                f"stages[{index}].scorer: {name!r} needs {', '.join(missing)}, which layer {probed} of this "
                f"{type(self.adapter.model).__name__} does not offer (adapter {self.adapter_name!r}): {reasons}. "
                f"Scorers that fit: {', '.join(fitting)}"
            )

    def probe_notes(self) -> list[str]:
        """What a reader of reports should know about the probes: layers that run whole, of unknown anatomy."""
        whole = []
        for stage in self._bound:
            needs = stage.scorer.required()
            if "objective" in needs:
                layer = stage.after_layer - 1 if "last" in needs else stage.after_layer
                if self.adapter.probe_kind(layer) == "layer":
                    whole.append(layer)
        return [f"layer {layer} is probed whole: {self.adapter.why_whole(layer)}" for layer in whole]

    def wait_notes(self) -> list[str]:
        """What a reader of times should know: selectors that wait for the accelerator that the model is on."""
        devices = {parameter.device for parameter in self.adapter.language_model.parameters()}
        accelerators = sorted({device.type for device in devices} - {"cpu"})
        if not accelerators:
            return []
        names: dict[str, list[int]] = {}
        for stage in self._bound:
            if stage.selector.waits:
                name = SELECTORS.name_of(type(stage.selector)) or type(stage.selector).__name__
                names.setdefault(name, []).append(stage.after_layer)
        return [
            f"selector {name} (after layer {', '.join(map(str, layers))}) chooses on the host in rounds and waits for "
            f"the device ({', '.join(accelerators)}) once in each; top-k does not wait"
            for name, layers in names.items()
        ]

    def _report(self, record: PrefillRecord) -> CompressionReport:
        return make_report(
            record,
            spec_name=self.spec.name,
            model=type(self.adapter.model).__name__,
            adapter=self.adapter_name,
            num_layers=len(self.adapter.layers),
            stages=self._bound,
            positions=self.positions,
            notes=[*self.probe_notes(), *self.wait_notes()],
            level=self._level,
            resize=self.spec.resize,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a pipeline is bound to one model.

        Raises:
            InputError: naming what to do instead.
        """
        raise InputError(
            f"pipeline: {self.spec.name!r} is bound to its model and cannot be copied or pickled; keep its spec "
            "(`pipeline.spec`, which can) and build another with trio.Pipeline.from_spec(spec, model)"
        )


def _decoded(records: deque[PrefillRecord], seconds: float) -> None:
    """Adds the time of a decode step to the last prefill's record."""
    if records:
        times = records[-1].seconds
        times["decode"] = times.get("decode", 0.0) + seconds


def _reads(name: str) -> tuple[Signal, ...]:
    """What a compressor reads with its default parameters."""
    try:
        compressor: Compressor = COMPRESSORS.build(name)
    except SpecError:  # a parameter without a default
        return ()
    return compressor.reads()


def _needs(name: str) -> frozenset[str]:
    """What a scorer needs with its default parameters."""
    try:
        scorer: Scorer = SCORERS.build(name)
    except SpecError:  # a parameter without a default
        return SCORERS.get(name).needs
    return scorer.required()
