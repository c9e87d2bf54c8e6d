"""A canary: what the runtime promises, tried on a tiny random model of the same classes.

transformers changes its internals in minor releases. On a release that the tests of this package did not run on, a
pipeline is attached only after the short form of the promises has held here, once for each model class in a process.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..core.backbone import Backbone, TinyModel
from ..core.context import LayerContext, SelectionContext
from ..core.probe import rows_at_end
from ..core.prompts import Inputs, Prompt
from ..core.upstream import MASK, NEWEST_TESTED, Role, cache_of, dynamic_cache, keywords, silenced, version
from ..errors import UnsupportedModelError
from ..scorers.base import Scorer
from ..selectors.base import Selector
from .hooks import Runtime
from .prefill import Selection
from .record import PrefillRecord
from .stage import BoundStage

if TYPE_CHECKING:
    from typing import Literal

#: Set to "allow" to attach on a release that was not tested, where an adapter has no tiny model to try it on.
PERMISSION = "TRIO_UNTESTED"
#: New tokens where generation is compared, and the largest difference of logits relative to the largest logit.
STEPS, TOLERANCE = 3, 1e-4
#: Longer than any sliding window of a tiny model.
LONG = " ".join(f"word{number}" for number in range(70))
PROMPTS = (Prompt("what is", 1, "in here", LONG), Prompt("how do", 2, "and", 3, "differ"), Prompt("only words", LONG))


@dataclass(frozen=True)
class Verdict:
    """What the canary found.

    Attributes:
        promises: those that were tried, in order.
        broken: the first one that does not hold; empty where all do.
        said: how it does not hold.
    """

    promises: tuple[str, ...]
    broken: str = ""
    said: str = ""


def is_untested() -> bool:
    """Whether the installed transformers is newer than the newest release that the tests ran on."""
    return _numbers(version()) > _numbers(NEWEST_TESTED)


def check_release(backbone: Backbone) -> None:
    """Tries the promises where the installed transformers was not tested; does nothing where it was.

    Args:
        backbone: of the model that a pipeline is about to be attached to.

    Raises:
        UnsupportedModelError: a promise does not hold, or there is no tiny model to try it on.
    """
    if not is_untested():
        return
    verdict = _remembered(_Subject(version(), type(backbone.model), type(backbone), weakref.ref(backbone)))
    name = type(backbone.model).__name__
    if verdict is None:
        if os.environ.get(PERMISSION) == "allow":
            return
        raise UnsupportedModelError(
            f"attach: {_newer()}, and the adapter {type(backbone).__name__} has no tiny_config to try the promises of "
            f"the runtime on a {name}; install transformers {NEWEST_TESTED}, give the adapter one "
            f"(docs/add-an-adapter.md), or set {PERMISSION}=allow and run `trio check` on your checkpoint"
        )
    if verdict.broken:
        raise UnsupportedModelError(
            f"attach: {_newer()}, and on a tiny {name} the promise {verdict.broken!r} does not hold: {verdict.said}. "
            f"Install transformers {NEWEST_TESTED} or a newer trio-vlm, and report what `trio doctor` prints"
        )


@dataclass(frozen=True)
class _Subject:
    """What a verdict holds for; the adapter itself plays no part in comparing."""

    release: str
    model: type
    adapter: type
    backbone: weakref.ref[Backbone] = field(compare=False)


@functools.lru_cache(maxsize=256)
def _remembered(subject: _Subject) -> Verdict | None:
    """The verdict on a model class, once a process, with one warning; None where there is nothing to try."""
    backbone = subject.backbone()
    assert backbone is not None  # the caller holds it
    verdict = sing(backbone)
    if verdict is not None and not verdict.broken:
        warnings.warn(
            f"{_newer()}; on a tiny {subject.model.__name__} these promises hold: {', '.join(verdict.promises)}",
            stacklevel=5,
        )
    return verdict


def tiny_of(backbone: Backbone) -> TinyModel:
    """A tiny random model of a backbone's classes, the same at every call; nothing of torch's settings changes.

    Raises:
        UnsupportedModelError: none is known.
    """
    with _undisturbed():
        tiny = backbone.tiny()
    if tiny is None:
        raise UnsupportedModelError(
            f"tiny model: the adapter {type(backbone).__name__} has no tiny_config for a "
            f"{type(backbone.model).__name__}; give it one (docs/add-an-adapter.md)"
        )
    return tiny


def _newer() -> str:
    return f"transformers {version()} is newer than {NEWEST_TESTED}, the newest release that trio-vlm was tested on"


def sing(backbone: Backbone) -> Verdict | None:
    """Tries the promises on a tiny model of a backbone's classes, in a few seconds on the CPU.

    The random state, the default dtype and the default device are as before.

    Returns:
        None where the backbone has no tiny model.
    """
    with _undisturbed():
        tiny = backbone.tiny()
        if tiny is None:
            return None
        tried: list[str] = []
        for name, promise in _promises(tiny):
            tried.append(name)
            try:
                promise()
            except Exception as error:  # whatever a release that is not known raises is a finding
                said = str(error).strip() or "no reason"
                kind = "" if isinstance(error, _BrokenPromise) else f"{type(error).__name__}: "
                return Verdict(tuple(tried), name, f"{kind}{said}")
    return Verdict(tuple(tried))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """CPU and float32 for the block, with a random state of its own."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        try:
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False), silenced():
                yield
        finally:
            torch.set_default_dtype(dtype)


def _promises(tiny: TinyModel) -> Iterator[tuple[str, Callable[[], None]]]:
    """The short form of the promises, in the order in which they are tried."""
    work = _Work(tiny)
    yield "identity", work.identity
    for positions in sorted(tiny.backbone.allowed_positions):
        yield f"decode equals recompute ({positions} positions)", functools.partial(work.decode, positions)
    yield "ragged batch equals singles", work.singles
    yield "beams", work.beams
    yield "a later turn", work.later_turn


class _BrokenPromise(Exception):
    """A promise that does not hold, with numbers."""


class _ByObjective(Scorer):
    """Saliency through the probe, as the scorers of the package get it."""

    def score(self, ctx: LayerContext) -> torch.Tensor:
        return ctx.at_visual(ctx.probe().saliency(rows_at_end(ctx.valid, 4)))


class _Best(Selector):
    """The tokens of the highest saliency."""

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        most, tokens = int(ctx.k.max()), ctx.saliency.shape[1]
        rank = ctx.saliency.sort(dim=1, descending=True, stable=True).indices[:, :most]
        chosen = torch.arange(most)[None] < ctx.k[:, None]
        order = torch.where(chosen, rank, tokens).sort(dim=1).values
        return order.clamp_max(tokens - 1), chosen


class _Work:
    """Runs of a tiny model, stock and compressed."""

    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        self.backbone = tiny.backbone
        self.model: Any = tiny.backbone.model

    def runtime(
        self, share: float = 0.5, positions: Literal["compact", "original"] = "original"
    ) -> tuple[Runtime, list[PrefillRecord]]:
        """Two stages that keep a share of what reaches each."""
        records: list[PrefillRecord] = []
        depth = len(self.backbone.layers)

        def keep_count(started: int, current: int) -> int:
            return max(1, round(share * current)) if share < 1 else current

        stages = [
            BoundStage(index, layer, _ByObjective(), _Best(), "image", keep_count)
            for index, layer in enumerate(sorted({depth // 4, depth // 2}))
        ]
        runtime = Runtime(
            self.backbone,
            stages,
            pipeline_name="canary",
            compact=positions == "compact",
            full_report=False,
            on_prefill=records.append,
            on_decode=lambda seconds: None,
        )
        return runtime, records

    def inputs(self, *prompts: Prompt) -> Inputs:
        return dict(self.tiny.inputs(prompts))

    def forward(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, **keywords({Role.USE_CACHE: False})).logits
        return logits

    def generate(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        given = {
            "max_new_tokens": STEPS,
            "min_new_tokens": STEPS,
            "do_sample": False,
            "suppress_tokens": list(self.tiny.unwritten) or None,
            "return_dict_in_generate": True,
            "output_logits": True,
            **keywords({Role.CACHE: dynamic_cache()}),
            **more,
        }
        return self.model.generate(**inputs, **given)

    # Promises

    def identity(self) -> None:
        inputs = self.inputs(*PROMPTS)
        stock = self.forward(inputs)
        runtime, _ = self.runtime(share=1.0)
        with _attached(runtime):
            _same(self.forward(inputs), stock, "with every token kept")
        _same(self.forward(inputs), stock, "after detaching")

    def decode(self, positions: Literal["compact", "original"]) -> None:
        runtime, records = self.runtime(positions=positions)
        with _attached(runtime):
            out = self.generate(self.inputs(*PROMPTS))
            selection = _selection(_dropping(records[-1]))
            for sample in range(len(PROMPTS)):
                logits = self.replayed(runtime, PROMPTS, out.sequences[sample], sample, selection)
                steps = torch.stack([step[sample] for step in out.logits])
                _close(steps, logits[0, -STEPS:], f"prompt {sample}, {STEPS} steps")

    def singles(self) -> None:
        runtime, records = self.runtime()
        with _attached(runtime):
            batch = self.forward(self.inputs(*PROMPTS))
            selection = _selection(_dropping(records[-1]))
            for sample, prompt in enumerate(PROMPTS):
                alone = self.forward(self.inputs(prompt))
                _close(batch[sample, -1:], alone[0, -1:], f"prompt {sample}")
                if prompt.images and _selection(records[-1]) != [[stage[sample]] for stage in selection]:
                    raise _BrokenPromise(f"prompt {sample} keeps other tokens alone")

    def beams(self) -> None:
        runtime, records = self.runtime()
        try:
            self._beams(None, lambda: [])
        except _BrokenPromise:
            return  # the stock model itself mixes up images under beams (transformers 5.17)
        with _attached(runtime):
            self._beams(runtime, lambda: [stage[:1] for stage in _selection(_dropping(records[-1]))])

    def _beams(self, runtime: Runtime | None, selection: Callable[[], Selection]) -> None:
        """The scores of beams against one pass each; without a runtime, of the stock model."""
        options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "length_penalty": 1.0}
        out = self.generate(self.inputs(*PROMPTS[:1]), **options)
        kept = selection()
        for beam, ids in enumerate(out.sequences):
            steps = self.replayed(runtime, PROMPTS[:1], ids, 0, kept)[0, -STEPS:].log_softmax(-1)
            score = steps.gather(1, ids[-STEPS:, None]).sum() / STEPS
            _close(out.sequences_scores[beam, None], score[None], f"the score of beam {beam}")

    def later_turn(self) -> None:
        runtime, records = self.runtime()
        first, more = self.inputs(PROMPTS[0]), self.inputs(Prompt("and now ?"))
        with _attached(runtime):
            answer = self.generate(first)
            selection = _selection(_dropping(records[-1]))
            ids = torch.cat([answer.sequences, more["input_ids"]], 1)
            text = {name: value for name, value in _extended(first, ids).items() if value.shape == ids.shape}
            out = self.generate(text, **keywords({Role.CACHE: cache_of(answer)}))
            logits = self.replayed(runtime, PROMPTS[:1], out.sequences[0], 0, selection)
            _close(torch.cat(list(out.logits)), logits[0, -STEPS:], f"{STEPS} steps")

    def replayed(
        self, runtime: Runtime | None, prompts: Sequence[Prompt], ids: torch.Tensor, sample: int, selection: Selection
    ) -> torch.Tensor:
        """Logits ``(1, S', V)`` of one sequence alone, in one pass without a cache that drops the same tokens."""
        alone = self.inputs(prompts[sample])
        padding = self.inputs(*prompts)["input_ids"].shape[1] - alone["input_ids"].shape[1]
        whole = _extended(alone, ids[None, padding:-1])
        if runtime is None:
            return self.forward(whole)
        runtime.forced = [[stage[sample]] for stage in selection]
        try:
            return self.forward(whole)
        finally:
            runtime.forced = None


@contextmanager
def _attached(runtime: Runtime) -> Iterator[None]:
    runtime.attach()
    try:
        yield
    finally:
        runtime.detach()


def _extended(inputs: Inputs, ids: torch.Tensor) -> Inputs:
    """The inputs with more text behind them; `ids` begin with their own."""
    shape = inputs["input_ids"].shape
    more = (shape[0], ids.shape[1] - shape[1])
    longer = {
        name: torch.cat([value, value.new_full(more, int(name == MASK))], 1)
        for name, value in inputs.items()
        if value.shape == shape
    }
    return {**inputs, **longer, "input_ids": ids}


def _selection(record: PrefillRecord) -> list[list[list[list[int]]]]:
    """Kept tokens by stage, sample and image."""
    out = []
    for _, stage in sorted(record.stages.items()):
        by_sample = []
        for sample, images in enumerate(record.images):
            flags, first, by_image = stage.kept[sample].tolist(), 0, []
            for image in images:
                by_image.append([token for token in range(image.tokens) if flags[first + token]])
                first += image.tokens
            by_sample.append(by_image)
        out.append(by_sample)
    return out


def _dropping(record: PrefillRecord) -> PrefillRecord:
    if len(set(record.layer_lengths)) == 1:
        raise _BrokenPromise(f"no token was dropped: {record.layer_lengths[0]} in every layer")
    return record


def _same(logits: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(logits, expected):
        raise _BrokenPromise(f"{what}: logits are not bitwise the stock model's")


def _close(logits: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if logits.shape != expected.shape:
        raise _BrokenPromise(f"{what}: shapes {tuple(logits.shape)} and {tuple(expected.shape)}")
    error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= TOLERANCE:
        raise _BrokenPromise(f"{what}: logits differ by {error:.1e} of the largest, allowed {TOLERANCE:.0e}")


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])
