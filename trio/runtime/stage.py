"""A stage as the runtime runs it: score, select, drop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..core.context import LayerContext, ProbeName
from ..core.probe import Probe
from ..errors import InputError
from .record import PrefillRecord, StageRecord
from .state import Groups, Sequence, drop, groups, kept_counts, places_of, ungroup

if TYPE_CHECKING:
    from ..scorers.base import Scorer
    from ..selectors.base import Selector


@dataclass(frozen=True)
class BoundStage:
    """A stage of a spec, resolved on a model.

    Attributes:
        index: place among the stages.
        after_layer: decoder layers that run before it.
        scorer: gives the saliencies.
        selector: picks the tokens.
        per: what a count holds for.
        keep_count: the count for a group, from the tokens it started with and those it has now.
    """

    index: int
    after_layer: int
    scorer: Scorer
    selector: Selector
    per: Literal["image", "sample"]
    keep_count: Callable[[int, int], int]


@dataclass
class Prefill:
    """The running forward of new visual tokens.

    Attributes:
        record: what will be reported.
        sequence: the tokens still there.
        input_ids: int64 ``(B, S)`` on the CPU.
        seeds: one number for each sample.
        modalities: for each image what encoded it.
        encoded: by modality, the arguments of the encoding that this forward uses.
        num_layers: decoder layers of the model.
        forced: for each stage the tokens to keep, bool ``(B, N)`` of the tokens at the start, in place of scoring.
        score_only: score, but drop nothing.
        keep_saliency: keep the saliencies in the record, and score even where nothing can be dropped.
        clock: whether to measure phases.
        finite: flags on the device, one for each scored stage.
        uncached: where the forward keeps no cache, the embeddings of its visual tokens, ``(n, D)``.
        repeats: whether the forward is a further step of generation without a cache.
    """

    record: PrefillRecord
    sequence: Sequence
    input_ids: torch.Tensor
    seeds: tuple[int, ...]
    num_layers: int
    modalities: tuple[tuple[str, ...], ...] = ()
    encoded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    forced: Mapping[int, torch.Tensor] | None = None
    score_only: bool = False
    keep_saliency: bool = False
    clock: bool = False
    finite: list[tuple[BoundStage, torch.Tensor]] = field(default_factory=list)
    uncached: torch.Tensor | None = None
    repeats: bool = False

    @cached_property
    def places(self) -> torch.Tensor:
        """Where the tokens at the start lie, behind the compressor: see `places_of`; the same at every stage."""
        return places_of(self.record.images)

    @property
    def shorter(self) -> bool:
        """Whether some token has been dropped."""
        started = tuple(tuple(image.tokens for image in sample) for sample in self.record.images)
        return self.sequence.counts != started

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Adds the time of the block to a phase; does nothing without a clock."""
        if not self.clock:
            yield
            return
        begin = now(device)
        yield
        seconds = self.record.seconds
        seconds[phase] = seconds.get(phase, 0.0) + now(device) - begin


def now(device: torch.device) -> float:
    """The clock in seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_stage(
    stage: BoundStage, prefill: Prefill, hidden: torch.Tensor, probes: Mapping[ProbeName, Callable[[], Probe]]
) -> torch.Tensor | None:
    """Runs a stage on the hidden states that enter a decoder layer, and updates the prefill.

    Args:
        stage: the stage.
        prefill: the running forward; its sequence and record are updated.
        hidden: ``(B, S, D)``.
        probes: what `LayerContext.probe` gives.

    Returns:
        int64 ``(B, S')``, the columns that remain (padding included), or None where no sample loses a token.
    """
    sequence = prefill.sequence
    group = groups(sequence, prefill.record.images, stage.per)
    asked = tuple(stage.keep_count(s, c) for s, c in zip(group.started, group.current, strict=True))
    drops = any(k < now for k, now in zip(asked, group.current, strict=True))
    scores = prefill.forced is None and (drops or prefill.keep_saliency or prefill.score_only)
    saliency = _score(stage, prefill, hidden, probes) if scores and group.started else None

    keep, counts = sequence.visual_valid, sequence.counts
    if prefill.score_only:
        pass
    elif prefill.forced is not None:
        keep = prefill.forced[stage.index].to(keep.device).gather(1, sequence.origin) & keep
        counts = _counts(sequence, keep)
    elif saliency is not None and drops:
        with prefill.timed("selection", hidden.device):
            places = prefill.places.to(hidden.device)
            keep, counts = _select(stage, group, asked, saliency, hidden, places, sequence)

    prefill.record.stages[stage.index] = StageRecord(
        kept=_at_origin(keep, sequence),
        entered=_at_origin(sequence.visual_valid, sequence),
        counts=counts,
        asked=asked,
        saliency=_saliency_at_origin(saliency, sequence) if prefill.keep_saliency or prefill.score_only else None,
        newlines=() if sequence.newlines is None else sequence.newlines.counts,
    )
    if counts == sequence.counts:
        return None
    prefill.sequence, columns = drop(sequence, keep, counts)
    if prefill.sequence.newlines is not None:
        prefill.record.stages[stage.index].newlines = prefill.sequence.newlines.counts
    return columns


def _score(
    stage: BoundStage, prefill: Prefill, hidden: torch.Tensor, probes: Mapping[ProbeName, Callable[[], Probe]]
) -> torch.Tensor:
    sequence = prefill.sequence
    context = LayerContext(
        hidden=hidden,
        visual=sequence.visual,
        valid=sequence.valid,
        visual_index=sequence.visual_index,
        visual_valid=sequence.visual_valid,
        origin=sequence.origin,
        images=prefill.record.images,
        counts=sequence.counts,
        seeds=prefill.seeds,
        after_layer=stage.after_layer,
        num_layers=prefill.num_layers,
        probes=probes,
    )
    with prefill.timed("scoring", hidden.device):
        saliency = stage.scorer.score(context)
    if saliency.shape != sequence.visual_valid.shape:
        raise InputError(
            f"stage after layer {stage.after_layer}: the scorer {type(stage.scorer).__name__} gave saliencies of shape "
            f"{tuple(saliency.shape)}; one number for each visual token is {tuple(sequence.visual_valid.shape)} here: "
            "run trio.testing.check_scorer on it"
        )
    prefill.finite.append((stage, (torch.isfinite(saliency) | ~sequence.visual_valid).all()))
    return saliency


def _select(
    stage: BoundStage,
    group: Groups,
    asked: tuple[int, ...],
    saliency: torch.Tensor,
    hidden: torch.Tensor,
    places: torch.Tensor,
    sequence: Sequence,
) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    sample = group.sample[:, None]
    scores = saliency[sample, group.index].masked_fill(~group.valid, float("-inf"))
    features = hidden[sample, sequence.visual_index[sample, group.index]]
    where = places[sample, sequence.origin[sample, group.index]]
    k = torch.tensor(asked, dtype=torch.int64)
    indices, chosen = stage.selector.select(scores, features, k, group.valid, where)
    if indices.shape != chosen.shape or indices.ndim != 2 or indices.shape[0] != len(asked):
        raise InputError(
            f"stage after layer {stage.after_layer}: the selector {type(stage.selector).__name__} gave indices of "
            f"shape {tuple(indices.shape)} and flags of shape {tuple(chosen.shape)}; both must be "
            f"({len(asked)} groups, K): run trio.testing.check_selector on it"
        )
    keep = ungroup(group, indices, chosen, sequence)
    kept = chosen.sum(1).tolist() if stage.selector.decides_count else list(asked)
    return keep, kept_counts(group, kept, sequence, keep)


def _counts(sequence: Sequence, keep: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Tokens that each image has left, read off the mask."""
    flags = keep.tolist()
    counts = []
    for sample, before in enumerate(sequence.counts):
        first, left = 0, []
        for now_there in before:
            left.append(sum(flags[sample][first : first + now_there]))
            first += now_there
        counts.append(tuple(left))
    return tuple(counts)


def _at_origin(keep: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """A mask over the present visual tokens as one over those at the start."""
    out = torch.zeros(keep.shape[0], sequence.started + 1, dtype=torch.bool, device=keep.device)
    out.scatter_(1, torch.where(sequence.visual_valid, sequence.origin, sequence.started), keep)
    return out[:, : sequence.started]


def _saliency_at_origin(saliency: torch.Tensor | None, sequence: Sequence) -> torch.Tensor | None:
    if saliency is None:
        return None
    out = torch.full((saliency.shape[0], sequence.started + 1), float("nan"), device=saliency.device)
    out.scatter_(1, torch.where(sequence.visual_valid, sequence.origin, sequence.started), saliency.float())
    return out[:, : sequence.started]
