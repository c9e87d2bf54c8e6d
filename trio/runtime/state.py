"""The running sequence: which tokens are still there, and the tensor work of dropping some. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F

from ..core.tokens import ImageTokens

#: What happens to newline tokens, which are structure and no picture.
NewlinePolicy = Literal["with-row", "always", "never"]
Side = Literal["left", "right"]
Images = tuple[tuple[ImageTokens, ...], ...]
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Newlines:
    """Tokens that end the rows of a picture.

    Attributes:
        here: bool ``(B, S)``, True at newline tokens.
        row: int64 ``(B, S)``, the row that a newline token ends, counted over the sample's pictures (0 elsewhere).
        row_of: int64 ``(B, N)``, the row of each visual token that the sample started with.
        rows: rows of the sample that has most.
        policy: ``with-row`` keeps a newline while its row has a token, ``always`` keeps all, ``never`` drops all with
            the first drop.
        counts: newline tokens that each sample still has.
    """

    here: torch.Tensor
    row: torch.Tensor
    row_of: torch.Tensor
    rows: int
    policy: NewlinePolicy
    counts: tuple[int, ...]


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
        newlines: the newline tokens; None in families without.
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
    newlines: Newlines | None = None

    def to(self, device: torch.device) -> Sequence:
        """The same on another device (a model may be spread over several)."""
        if self.valid.device == device:
            return self
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
        lines = self.newlines
        if lines is not None:
            moved["newlines"] = replace(
                lines, here=lines.here.to(device), row=lines.row.to(device), row_of=lines.row_of.to(device)
            )
        return Sequence(**moved)

    @property
    def ragged(self) -> bool:
        """Whether some column of some sample is padding."""
        return any(length != self.valid.shape[1] for length in self.lengths)


def start(
    placeholders: torch.Tensor,
    valid: torch.Tensor,
    images: Images,
    device: torch.device,
    policy: NewlinePolicy = "with-row",
) -> tuple[Sequence, Images]:
    """The sequence as it enters the model.

    Args:
        placeholders: bool ``(B, S)`` on the CPU, True at the tokens of pictures, newlines included.
        valid: bool ``(B, S)`` on the CPU.
        images: the images of each sample, newlines included.
        device: where the tensors go.
        policy: what happens to newlines.

    Returns:
        The sequence, and the images without their newlines: only visual tokens are scored, counted and selected.
    """
    batch, length = placeholders.shape
    visual, newlines = _split(placeholders, images, device, policy)
    pictures = tuple(tuple(image.select(image.is_picture.nonzero().squeeze(1)) for image in row) for row in images)
    totals = [sum(image.tokens for image in sample) for sample in pictures]
    most = max(totals, default=0)
    index = _true_first(visual, most)
    visual_valid = torch.arange(most)[None] < torch.tensor(totals)[:, None]
    zero = torch.zeros(batch, length, dtype=torch.int64, device=device)
    # A sample whose last column is padding came padded on the right. Without padding, left is what generate reads.
    side: Side = "right" if not bool(valid[:, -1].all()) else "left"
    sequence = Sequence(
        column=torch.arange(length, device=device).expand(batch, -1),
        valid=valid.to(device),
        visual=visual.to(device),
        visual_index=index.to(device),
        visual_valid=visual_valid.to(device),
        origin=torch.arange(most, device=device).expand(batch, -1),
        dropped_before=zero,
        dropped=zero[:, 0],
        started=most,
        counts=tuple(tuple(image.tokens for image in sample) for sample in pictures),
        lengths=tuple(valid.sum(1).tolist()),
        side=side,
        newlines=newlines,
    )
    return sequence, pictures


def _split(
    placeholders: torch.Tensor, images: Images, device: torch.device, policy: NewlinePolicy
) -> tuple[torch.Tensor, Newlines | None]:
    """Visual tokens and newline tokens among the placeholders."""
    if all(bool(image.is_picture.all()) for sample in images for image in sample):
        return placeholders, None
    visual, here = placeholders.clone(), torch.zeros_like(placeholders)
    row = torch.zeros(placeholders.shape, dtype=torch.int64)
    row_of, most = [], 1
    for sample, members in enumerate(images):
        columns = placeholders[sample].nonzero().squeeze(1)
        rows, picture, first = [], [], 0
        for image in members:
            tall = max(rows_ for rows_, _ in image.grids)
            rows.append(first + image.frame * tall + image.row)
            picture.append(image.is_picture)
            first += tall * (int(image.frame.max()) + 1)
        most = max(most, first)
        is_picture = torch.cat(picture) if picture else torch.zeros(0, dtype=torch.bool)
        all_rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        visual[sample, columns] = is_picture
        here[sample, columns] = ~is_picture
        row[sample, columns] = torch.where(is_picture, 0, all_rows)
        row_of.append(all_rows[is_picture])
    padded = torch.nn.utils.rnn.pad_sequence(row_of, batch_first=True)
    counts = tuple(here.sum(1).tolist())
    return visual, Newlines(here.to(device), row.to(device), padded.to(device), most, policy, counts)


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


def places_of(images: Images) -> torch.Tensor:
    """Where the tokens at the start lie, see `Selector.select`: float32 ``(B, N, 3)`` on the CPU, 0 at padding."""
    samples = [
        torch.cat([F.pad(image.place, (0, 1), value=float(number)) for number, image in enumerate(sample)])
        if sample
        else torch.zeros(0, 3)
        for sample in images
    ]
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)


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
    stays = stays[:, :length]
    text, newlines, gone_lines = sequence.valid & ~sequence.visual, sequence.newlines, [0] * batch
    if newlines is not None:
        text = text & ~newlines.here
        ends = _newlines_that_stay(newlines, sequence, keep)
        # Which rows keep a token is known on the device only: one look for each stage in families with newlines.
        left = newlines.counts if newlines.policy == "always" else tuple(ends.sum(1).tolist())
        gone_lines = [before - after for before, after in zip(newlines.counts, left, strict=True)]
        stays = stays | ends
    stays = stays | text
    lengths = tuple(
        now - sum(before) + sum(after) - lines
        for now, before, after, lines in zip(sequence.lengths, sequence.counts, counts, gone_lines, strict=True)
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
            newlines=None if newlines is None else _taken(newlines, take, valid, left),
        ),
        take,
    )


def _newlines_that_stay(newlines: Newlines, sequence: Sequence, keep: torch.Tensor) -> torch.Tensor:
    """bool ``(B, S)``, by the policy."""
    if newlines.policy == "always":
        return newlines.here
    if newlines.policy == "never":
        return torch.zeros_like(newlines.here)
    rows = torch.zeros(keep.shape[0], newlines.rows + 1, dtype=torch.bool, device=keep.device)
    row = newlines.row_of.gather(1, sequence.origin.clamp_max(max(newlines.row_of.shape[1] - 1, 0)))
    rows.scatter_(1, torch.where(keep, row, newlines.rows), True)
    return rows.gather(1, newlines.row) & newlines.here


def _taken(newlines: Newlines, take: torch.Tensor, valid: torch.Tensor, left: tuple[int, ...]) -> Newlines:
    return replace(newlines, here=newlines.here.gather(1, take) & valid, row=newlines.row.gather(1, take), counts=left)


def _true_first(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the first `count` True of each row, in rising order; other columns follow where there are fewer."""
    return (~mask).to(torch.int8).sort(dim=1, stable=True).indices[:, :count]
