"""The running sequence: which tokens are still there, and the tensor work of dropping some. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trio.origins import ImageTokens

Side = Literal["left", "right"]
Images = tuple[tuple[ImageTokens, ...], ...]
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sequence:
    """The tokens of a forward at some depth. B samples, S columns, N the most visual tokens that a sample has.

    Attributes:
        column: int64 ``(B, S)``, the column of each token in the forward's own input.
        valid: bool ``(B, S)``, False at padding.
        visual: bool ``(B, S)``.
        visual_index: int64 ``(B, N)``, columns of the visual tokens in rising order.
        visual_valid: bool ``(B, N)``.
        origin: int64 ``(B, N)``, the place of each visual token among those that the sample started with.
        dropped_before: int64 ``(B, S)``, tokens of this forward dropped in front of each column.
        dropped: int64 ``(B,)``, tokens of this forward dropped so far.
        started: visual tokens that the richest sample started with.
        counts: for each sample, how many visual tokens each image still has (known on the host).
        lengths: for each sample, its valid tokens (known on the host).
        side: on which side padding goes.
    """

    column: torch.Tensor
    valid: torch.Tensor
    visual: torch.Tensor
    visual_index: torch.Tensor
    visual_valid: torch.Tensor
    origin: torch.Tensor
    dropped_before: torch.Tensor
    dropped: torch.Tensor
    started: int
    counts: Counts
    lengths: tuple[int, ...]
    side: Side

    @property
    def ragged(self) -> bool:
        """Whether some column of some sample is padding."""
        return any(length != self.valid.shape[1] for length in self.lengths)


def start(visual: torch.Tensor, valid: torch.Tensor, images: Images, device: torch.device) -> Sequence:
    """The sequence as it enters the model.

    Args:
        visual: bool ``(B, S)`` on the CPU.
        valid: bool ``(B, S)`` on the CPU.
        images: the images of each sample.
        device: where the tensors go.
    """
    batch, length = visual.shape
    totals = [sum(image.tokens for image in sample) for sample in images]
    most = max(totals, default=0)
    index = _true_first(visual, most)
    visual_valid = torch.arange(most)[None] < torch.tensor(totals)[:, None]
    zero = torch.zeros(batch, length, dtype=torch.int64, device=device)
    # A sample whose last column is padding came padded on the right. Without padding, left is what generate reads.
    side: Side = "right" if not bool(valid[:, -1].all()) else "left"
    return Sequence(
        column=torch.arange(length, device=device).expand(batch, -1),
        valid=valid.to(device),
        visual=visual.to(device),
        visual_index=index.to(device),
        visual_valid=visual_valid.to(device),
        origin=torch.arange(most, device=device).expand(batch, -1),
        dropped_before=zero,
        dropped=zero[:, 0],
        started=most,
        counts=tuple(tuple(image.tokens for image in sample) for sample in images),
        lengths=tuple(valid.sum(1).tolist()),
        side=side,
    )


@dataclass(frozen=True)
class Groups:
    """Visual tokens gathered by the unit that a count holds for: an image, or all images of a sample.

    Attributes:
        sample: int64 ``(G,)``, the sample of each group.
        index: int64 ``(G, n)``, places among the sample's visual tokens.
        valid: bool ``(G, n)``.
        started: tokens that each group started with.
        current: tokens that each group has now.
        per: what a group is.
    """

    sample: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor
    started: tuple[int, ...]
    current: tuple[int, ...]
    per: Literal["image", "sample"]


def groups(sequence: Sequence, images: Images, per: Literal["image", "sample"]) -> Groups:
    """The groups of a sequence's visual tokens; samples without any have none."""
    rows: list[tuple[int, int, int, int]] = []  # sample, first place, tokens now, tokens at the start
    for sample, counts in enumerate(sequence.counts):
        started = [image.tokens for image in images[sample]]
        if per == "sample":
            if counts:
                rows.append((sample, 0, sum(counts), sum(started)))
            continue
        first = 0
        for now, before in zip(counts, started, strict=True):
            rows.append((sample, first, now, before))
            first += now
    most = max((now for _, _, now, _ in rows), default=0)
    places = torch.arange(most)[None]
    first_place = torch.tensor([first for _, first, _, _ in rows], dtype=torch.int64)[:, None]
    current = torch.tensor([now for _, _, now, _ in rows], dtype=torch.int64)[:, None]
    last = max(sequence.origin.shape[1] - 1, 0)
    device = sequence.valid.device
    return Groups(
        sample=torch.tensor([sample for sample, _, _, _ in rows], dtype=torch.int64).to(device),
        index=(first_place + places).clamp_max(last).to(device),
        valid=(places < current).to(device),
        started=tuple(before for _, _, _, before in rows),
        current=tuple(now for _, _, now, _ in rows),
        per=per,
    )


def ungroup(group: Groups, indices: torch.Tensor, valid: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """What a selector chose, as a mask over the visual tokens.

    Args:
        group: the groups that the selector saw.
        indices: int64 ``(G, K)``.
        valid: bool ``(G, K)``.
        sequence: the sequence that the groups come from.

    Returns:
        bool ``(B, N)``, True at tokens to keep.
    """
    size = group.index.shape[1]
    chosen = torch.zeros(len(group.started), size + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(1, torch.where(valid, indices, size), True)
    batch, most = sequence.origin.shape
    keep = torch.zeros(batch, most + 1, dtype=torch.bool, device=indices.device)
    keep[group.sample[:, None], torch.where(group.valid, group.index, most)] = chosen[:, :size] & group.valid
    return keep[:, :most]


def kept_counts(group: Groups, kept: list[int], sequence: Sequence, keep: torch.Tensor) -> Counts:
    """Tokens that each image has left, from the numbers that each group keeps.

    Groups that are whole samples of several images need one look at the tensor, the rest is known on the host.
    """
    per_sample: list[list[int]] = [[] for _ in sequence.counts]
    samples = [sample for sample, counts in enumerate(sequence.counts) for _ in range(len(counts))]
    if group.per == "image":
        for sample, count in zip(samples, kept, strict=True):
            per_sample[sample].append(count)
        return tuple(tuple(counts) for counts in per_sample)
    owners = [sample for sample, counts in enumerate(sequence.counts) if counts]
    for sample, count in zip(owners, kept, strict=True):
        if len(sequence.counts[sample]) == 1:
            per_sample[sample] = [count]
        else:
            flags = keep[sample, : sum(sequence.counts[sample])].tolist()
            first = 0
            for now in sequence.counts[sample]:
                per_sample[sample].append(sum(flags[first : first + now]))
                first += now
    return tuple(tuple(counts) for counts in per_sample)


def drop(sequence: Sequence, keep: torch.Tensor, counts: Counts) -> tuple[Sequence, torch.Tensor]:
    """Drops visual tokens and pads again on the side that the batch came with.

    Args:
        sequence: the present sequence.
        keep: bool ``(B, N)``, visual tokens to keep.
        counts: tokens that each image has left, as `keep` says.

    Returns:
        The new sequence, and int64 ``(B, S')``, the present columns that make it up (padding points at anything).
    """
    batch, length = sequence.valid.shape
    stays = torch.zeros(batch, length + 1, dtype=torch.bool, device=keep.device)
    stays.scatter_(1, torch.where(sequence.visual_valid, sequence.visual_index, length), keep)
    stays = stays[:, :length] | (sequence.valid & ~sequence.visual)
    lengths = tuple(
        now - sum(before) + sum(after)
        for now, before, after in zip(sequence.lengths, sequence.counts, counts, strict=True)
    )
    new_length = max(lengths)
    order = (stays if sequence.side == "left" else ~stays).to(torch.int8).sort(dim=1, stable=True).indices
    take = order[:, length - new_length :] if sequence.side == "left" else order[:, :new_length]
    valid = stays.gather(1, take)
    visual = sequence.visual.gather(1, take) & valid
    most = max((sum(after) for after in counts), default=0)
    totals = torch.tensor([sum(after) for after in counts], dtype=torch.int64).to(keep.device)
    gone = (sequence.valid & ~stays).to(torch.int64)
    before = sequence.dropped_before + gone.cumsum(1) - gone
    return (
        Sequence(
            column=sequence.column.gather(1, take),
            valid=valid,
            visual=visual,
            visual_index=_true_first(visual, most),
            visual_valid=torch.arange(most, device=keep.device)[None] < totals[:, None],
            origin=sequence.origin.gather(1, _true_first(keep, most)),
            dropped_before=before.gather(1, take),
            dropped=sequence.dropped + gone.sum(1),
            started=sequence.started,
            counts=counts,
            lengths=lengths,
            side=sequence.side,
        ),
        take,
    )


def _true_first(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the first `count` True of each row, in rising order; other columns follow where there are fewer."""
    return (~mask).to(torch.int8).sort(dim=1, stable=True).indices[:, :count]
