"""A stage as the runtime runs it: score, select, drop."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..core.context import DeferredOrigins, LayerContext, ProbeName, SelectionContext, TokenOrigins
from ..core.probe import Probe
from ..core.transfer import upload
from ..errors import InputError
from .forward import Prefill
from .record import StageRecord
from .state import Groups, TokenState, groups, kept_counts, ungroup

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


def run_stage(
    stage: BoundStage, prefill: Prefill, hidden: torch.Tensor, probes: Mapping[ProbeName, Callable[[], Probe]]
) -> torch.Tensor | None:
    """Runs a stage on the hidden states that enter a decoder layer, and updates the prefill.

    Args:
        stage: the stage.
        prefill: the running forward; its state and record are updated.
        hidden: ``(B, S, D)``.
        probes: what `LayerContext.probe` gives.

    Returns:
        int64 ``(B, S')``, the columns that remain (padding included), or None where no sample loses a token.
    """
    state = prefill.state
    group = groups(state, prefill.record.images, stage.per)
    asked = tuple(stage.keep_count(s, c) for s, c in zip(group.started, group.current, strict=True))
    drops = any(k < current for k, current in zip(asked, group.current, strict=True))
    scores = prefill.forced is None and (drops or prefill.keep_saliency or prefill.score_only)
    saliency = _score(stage, prefill, hidden, probes) if scores and group.started else None

    keep, counts = state.visual_valid, state.counts
    if prefill.score_only:
        pass
    elif prefill.forced is not None:
        forced = prefill.forced[stage.index]
        known = prefill.known(forced)
        keep = upload(forced, known.valid.device).gather(1, known.token_index) & known.visual_valid
        counts = _counts(known, keep)
    elif saliency is not None and drops:
        with prefill.timed("selection", hidden.device):
            keep, counts = _select(stage, group, asked, saliency, hidden, prefill)

    known = prefill.known(keep)
    record = prefill.record.stages[stage.index] = StageRecord(
        keep=keep,
        reached=known.visual_valid,
        token_index=known.token_index,
        most_at_start=state.most_at_start,
        counts=counts,
        asked=asked,
        scores=saliency if prefill.keep_saliency or prefill.score_only else None,
        newlines=() if state.newlines is None else state.newlines.counts,
    )
    if counts == state.counts:
        return None
    columns = prefill.drop(keep, counts)
    if prefill.state.newlines is not None:
        record.newlines = prefill.state.newlines.counts
    return columns


def _score(
    stage: BoundStage, prefill: Prefill, hidden: torch.Tensor, probes: Mapping[ProbeName, Callable[[], Probe]]
) -> torch.Tensor:
    state = prefill.state
    context = LayerContext(
        hidden=hidden,
        visual=state.visual,
        valid=state.valid,
        visual_index=state.visual_index,
        visual_valid=state.visual_valid,
        token_index=state.token_index,
        images=prefill.record.images,
        counts=state.counts,
        seeds=prefill.seeds,
        after_layer=stage.after_layer,
        num_layers=prefill.num_layers,
        probes=probes,
        tail=state.tail,
    )
    with prefill.timed("scoring", hidden.device):
        saliency = stage.scorer.score(context)
    if saliency.shape != state.visual_valid.shape:
        raise InputError(
            f"stage after layer {stage.after_layer}: the scorer {type(stage.scorer).__name__} gave saliencies of shape "
            f"{tuple(saliency.shape)}; one number for each visual token is {tuple(state.visual_valid.shape)} here: "
            "run trio.testing.check_scorer on it"
        )
    rated = torch.where(state.visual_valid, saliency, 0) if state.uneven else saliency
    if rated.numel():
        prefill.finite.append((stage, rated.aminmax()))  # nan spreads to both
    return saliency


def _select(
    stage: BoundStage,
    group: Groups,
    asked: tuple[int, ...],
    saliency: torch.Tensor,
    hidden: torch.Tensor,
    prefill: Prefill,
) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    context = selection_context(stage, group, asked, saliency, hidden, prefill)
    indices, chosen = stage.selector.select(context)
    if indices.shape != chosen.shape or indices.ndim != 2 or indices.shape[0] != len(asked):
        raise InputError(
            f"stage after layer {stage.after_layer}: the selector {type(stage.selector).__name__} gave indices of "
            f"shape {tuple(indices.shape)} and flags of shape {tuple(chosen.shape)}; both must be "
            f"({len(asked)} groups, K): run trio.testing.check_selector on it"
        )
    known = prefill.known(indices)
    if known is prefill.host:
        group = groups(known, prefill.record.images, stage.per)
    indices, chosen = upload(indices, known.valid.device), upload(chosen, known.valid.device)
    full = not stage.selector.decides_count and set(asked) == {indices.shape[1]}
    keep = ungroup(group, indices, None if full else chosen, known)
    kept = chosen.sum(1).tolist() if stage.selector.decides_count else list(asked)
    return keep, kept_counts(group, kept, known, keep)


def selection_context(
    stage: BoundStage,
    group: Groups,
    asked: tuple[int, ...],
    saliency: torch.Tensor,
    hidden: torch.Tensor,
    prefill: Prefill,
) -> SelectionContext:
    """What the stage's selector sees.

    Args:
        stage: the stage.
        group: the groups that it selects in.
        asked: tokens to keep of each.
        saliency: float32 ``(B, N)`` of the present visual tokens.
        hidden: ``(B, S, D)``.
        prefill: the running forward.
    """
    state, device = prefill.state, hidden.device
    by_group = group.take(saliency)
    padded = group.place is not None or state.uneven

    def origins() -> TokenOrigins:
        token_index = group.take(state.token_index)
        return prefill.origins_on(device).map(lambda values: group.at(values, token_index))

    if prefill.sizes is None:
        sizes = prefill.one.to(device).expand(by_group.shape)
    else:
        sizes = group.take(prefill.sizes.to(device).gather(1, state.token_index))
    return SelectionContext(
        saliency=by_group.masked_fill(~group.valid, float("-inf")) if padded else by_group,
        features=group.at(hidden, group.take(state.visual_index)),
        k=torch.tensor(asked, dtype=torch.int64),
        valid=group.valid,
        counts=group.current,
        origins=DeferredOrigins(origins),
        sizes=sizes,
        seeds=_group_seeds(stage, prefill),
    )


def _group_seeds(stage: BoundStage, prefill: Prefill) -> tuple[int, ...]:
    """One number for each group, in the order of `groups`."""
    names = [
        f"{seed}/{stage.index}/{name}"
        for seed, images in zip(prefill.seeds, prefill.record.images, strict=True)
        for name in (range(len(images)) if stage.per == "image" else ("all",) if images else ())
    ]
    return tuple(zlib.crc32(name.encode()) for name in names)


def _counts(state: TokenState, keep: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Tokens that each image has left, read off the mask."""
    flags = keep.tolist()
    counts = []
    for sample, before in enumerate(state.counts):
        first, kept = 0, []
        for tokens in before:
            kept.append(sum(flags[sample][first : first + tokens]))
            first += tokens
        counts.append(tuple(kept))
    return tuple(counts)
