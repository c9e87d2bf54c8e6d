"""The tokens of a running forward: which are still there, and the tensor work of dropping some. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from ..core.context import TokenOrigins
from ..core.ops import take_rows
from ..core.tokens import ImageTokens
from ..core.transfer import upload, upload_all

#: What happens to newline tokens, which are structure and no part of the image.
NewlinePolicy = Literal["with-row", "always", "never"]
Side = Literal["left", "right"]
Images = tuple[tuple[ImageTokens, ...], ...]
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Newlines:
    """Tokens that end the rows of an image.

    Attributes:
        mask: bool ``(B, S)``, True at newline tokens.
        row: int64 ``(B, S)``, the row that a newline token ends, counted over the sample's images (0 elsewhere).
        row_of: int64 ``(B, N)``, the row of each visual token that the sample started with.
        rows: rows of the sample that has most.
        policy: ``with-row`` keeps a newline while its row has a token, ``always`` keeps all, ``never`` drops all with
            the first drop.
        counts: newline tokens that each sample still has.
    """

    mask: torch.Tensor
    row: torch.Tensor
    row_of: torch.Tensor
    rows: int
    policy: NewlinePolicy
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TokenState:
    """The tokens of a forward at some depth. B samples, S columns, N the most visual tokens that a sample has.

    Attributes:
        column: int64 ``(B, S)``, the column of each token in the forward's own input.
        valid: bool ``(B, S)``, False at padding.
        visual: bool ``(B, S)``.
        visual_index: int64 ``(B, N)``, columns of the visual tokens in rising order.
        visual_valid: bool ``(B, N)``.
        token_index: int64 ``(B, N)``, the index of each visual token among those that the sample started with.
        ranks: int64 ``(B, columns at the start)``, valid tokens up to each column of the forward's own input.
        most_at_start: visual tokens that the richest sample started with.
        counts: for each sample, how many visual tokens each image still has (known on the host).
        sample_lengths: for each sample, its valid tokens (known on the host).
        started: for each sample, the valid tokens that it started with.
        side: on which side padding goes.
        newlines: the newline tokens; None in families without.
        tail: so many columns at the end are text behind all images, in every sample.
    """

    column: torch.Tensor
    valid: torch.Tensor
    visual: torch.Tensor
    visual_index: torch.Tensor
    visual_valid: torch.Tensor
    token_index: torch.Tensor
    ranks: torch.Tensor
    most_at_start: int
    counts: Counts
    sample_lengths: tuple[int, ...]
    started: tuple[int, ...]
    side: Side
    newlines: Newlines | None = None
    tail: int = 0

    def to(self, device: torch.device, before: TokenState | None = None) -> TokenState:
        """The same on another device (a model may be spread over several); from the CPU in one copy.

        Args:
            device: where it goes.
            before: the state on that device from which this one was made by a drop: what that leaves as it is is there.
        """
        if self.valid.device == device:
            return self
        tensors = {name: getattr(self, name) for name in _TENSORS if before is None or name not in _STEADY}
        lines = self.newlines
        if lines is not None:
            names = [name for name in _OF_NEWLINES if before is None or name not in _STEADY]
            tensors |= {f"newlines {name}": getattr(lines, name) for name in names}
        moved: dict[str, Any] = dict(zip(tensors, upload_all(list(tensors.values()), device), strict=True))
        if before is not None:
            moved["ranks"] = before.ranks
            if before.newlines is not None:
                moved["newlines row_of"] = before.newlines.row_of
        if lines is not None:
            lines = replace(lines, **{name: moved[f"newlines {name}"] for name in _OF_NEWLINES})
        return replace(self, **{name: moved[name] for name in _TENSORS}, newlines=lines)

    @property
    def ragged(self) -> bool:
        """Whether some column of some sample is padding."""
        return any(length != self.valid.shape[1] for length in self.sample_lengths)

    @property
    def uneven(self) -> bool:
        """Whether some sample has fewer visual tokens than another."""
        return any(sum(counts) != self.token_index.shape[1] for counts in self.counts)

    def dropped_before(self) -> torch.Tensor:
        """int64 ``(B, S)``, tokens of this forward dropped in front of each valid column; 0 at padding."""
        return torch.where(self.valid, self.ranks.gather(1, self.column) - self.valid.cumsum(1), 0)

    def dropped_in_forward(self) -> torch.Tensor:
        """int64 ``(B,)``, tokens of this forward dropped so far."""
        gone = [before - after for before, after in zip(self.started, self.sample_lengths, strict=True)]
        return upload(gone, self.valid.device, torch.int64)


#: Tensors of a state and of its newlines, and those that no drop changes.
_TENSORS = ("column", "valid", "visual", "visual_index", "visual_valid", "token_index", "ranks")
_OF_NEWLINES, _STEADY = ("mask", "row", "row_of"), ("ranks", "row_of")


def start(
    placeholders: torch.Tensor, valid: torch.Tensor, images: Images, policy: NewlinePolicy = "with-row"
) -> tuple[TokenState, Images]:
    """The tokens as they enter the model, on the CPU.

    Args:
        placeholders: bool ``(B, S)`` on the CPU, True at the tokens of images, newlines included.
        valid: bool ``(B, S)`` on the CPU.
        images: the images of each sample, newlines included.
        policy: what happens to newlines.

    Returns:
        The tokens, and the images without their newlines: only visual tokens are scored, counted and selected.
    """
    batch, length = placeholders.shape
    visual, newlines = _split(placeholders, images, policy)
    without_newlines = tuple(
        tuple(image.select(image.is_visual.nonzero().squeeze(1)) for image in sample) for sample in images
    )
    totals = [sum(image.tokens for image in sample) for sample in without_newlines]
    most = max(totals, default=0)
    index = _true_first(visual, most)
    visual_valid = torch.arange(most)[None] < torch.tensor(totals)[:, None]
    lengths = tuple(valid.sum(1).tolist())
    # A sample whose last column is padding came padded on the right. Without padding, left is what generate reads.
    side: Side = "right" if not bool(valid[:, -1].all()) else "left"
    text = valid & ~placeholders
    state = TokenState(
        column=torch.arange(length).expand(batch, -1),
        valid=valid,
        visual=visual,
        visual_index=index,
        visual_valid=visual_valid,
        token_index=torch.arange(most).expand(batch, -1),
        ranks=valid.cumsum(1),
        most_at_start=most,
        counts=tuple(tuple(image.tokens for image in sample) for sample in without_newlines),
        sample_lengths=lengths,
        started=lengths,
        side=side,
        newlines=newlines,
        tail=int(text.flip(1).cummin(1).values.sum(1).min()),
    )
    return state, without_newlines


def _split(placeholders: torch.Tensor, images: Images, policy: NewlinePolicy) -> tuple[torch.Tensor, Newlines | None]:
    """Visual tokens and newline tokens among the placeholders."""
    if all(bool(image.is_visual.all()) for sample in images for image in sample):
        return placeholders, None
    visual, mask = placeholders.clone(), torch.zeros_like(placeholders)
    row = torch.zeros(placeholders.shape, dtype=torch.int64)
    row_of, most = [], 1
    for sample, members in enumerate(images):
        columns = placeholders[sample].nonzero().squeeze(1)
        rows, visual_flags, first = [], [], 0
        for image in members:
            tall = max(rows_ for rows_, _ in image.grids)
            rows.append(first + image.frame * tall + image.row)
            visual_flags.append(image.is_visual)
            first += tall * (int(image.frame.max()) + 1)
        most = max(most, first)
        is_visual = torch.cat(visual_flags) if visual_flags else torch.zeros(0, dtype=torch.bool)
        all_rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        visual[sample, columns] = is_visual
        mask[sample, columns] = ~is_visual
        row[sample, columns] = torch.where(is_visual, 0, all_rows)
        row_of.append(all_rows[is_visual])
    padded = torch.nn.utils.rnn.pad_sequence(row_of, batch_first=True)
    counts = tuple(mask.sum(1).tolist())
    return visual, Newlines(mask, row, padded, most, policy, counts)


@dataclass(frozen=True)
class Groups:
    """Visual tokens gathered by the unit that a count holds for: an image, or all images of a sample.

    Attributes:
        place: int64 ``(G, 1)``, the sample of each group, and int64 ``(G, n)``, each token's number among those that
            the sample has now; None where each sample is one group, so that both are the same tensors.
        valid: bool ``(G, n)``.
        started: tokens that each group started with.
        current: tokens that each group has now.
        per: what a group is.
    """

    place: tuple[torch.Tensor, torch.Tensor] | None
    valid: torch.Tensor
    started: tuple[int, ...]
    current: tuple[int, ...]
    per: Literal["image", "sample"]

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(B, N, ...)`` of the present visual tokens by group, ``(G, n, ...)``."""
        return values if self.place is None else values[self.place]

    def at(self, values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Values ``(B, m)`` or ``(B, m, D)`` at columns of each group's sample, int64 ``(G, n)``: ``(G, n, ...)``."""
        if self.place is not None:
            return values[self.place[0], columns]
        return values.gather(1, columns) if values.ndim == 2 else take_rows(values, columns)


def groups(state: TokenState, images: Images, per: Literal["image", "sample"]) -> Groups:
    """The groups of the present visual tokens; samples without any have none."""
    rows: list[tuple[int, int, int, int]] = []  # sample, first place, tokens now, tokens at the start
    for sample, counts in enumerate(state.counts):
        started = [image.tokens for image in images[sample]]
        if per == "sample":
            if counts:
                rows.append((sample, 0, sum(counts), sum(started)))
            continue
        first = 0
        for now, before in zip(counts, started, strict=True):
            rows.append((sample, first, now, before))
            first += now
    most = max((tokens for _, _, tokens, _ in rows), default=0)
    counted = tuple(before for _, _, _, before in rows), tuple(tokens for _, _, tokens, _ in rows)
    if [sample for sample, _, _, _ in rows] == list(range(len(state.counts))):
        return Groups(None, state.visual_valid, *counted, per=per)
    column = torch.arange(most)[None]
    first_place = torch.tensor([first for _, first, _, _ in rows], dtype=torch.int64)[:, None]
    current = torch.tensor([now for _, _, now, _ in rows], dtype=torch.int64)[:, None]
    last = max(state.token_index.shape[1] - 1, 0)
    samples = torch.tensor([sample for sample, _, _, _ in rows], dtype=torch.int64)[:, None]
    index, there = (first_place + column).clamp_max(last), column < current
    samples, index, valid = upload_all([samples, index, there], state.valid.device)
    return Groups((samples, index), valid, *counted, per=per)


def origins_of(images: Images) -> TokenOrigins:
    """Where the tokens at the start come from: tensors ``(B, N)`` on the CPU, 0 at padding."""

    def padded(values: Callable[[int, ImageTokens], torch.Tensor]) -> torch.Tensor:
        rows = [
            torch.cat([values(number, image) for number, image in enumerate(sample)])
            if sample
            else values(0, ImageTokens.from_grid(0, 0))
            for sample in images
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return TokenOrigins(
        row=padded(lambda _, image: image.grid_positions[:, 0]),
        column=padded(lambda _, image: image.grid_positions[:, 1]),
        image=padded(lambda number, image: torch.full_like(image.frame, number)),
        frame=padded(lambda _, image: image.frame),
        kind=padded(lambda _, image: image.kind),
    )


def ungroup(group: Groups, indices: torch.Tensor, valid: torch.Tensor | None, state: TokenState) -> torch.Tensor:
    """What a selector chose, as a mask over the visual tokens.

    Args:
        group: the groups that the selector saw.
        indices: int64 ``(G, K)``.
        valid: bool ``(G, K)``; None: all are.
        state: the tokens that the groups come from.

    Returns:
        bool ``(B, N)``, True at tokens to keep.
    """
    size = group.valid.shape[1]
    chosen = torch.zeros(len(group.started), size + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(1, indices if valid is None else torch.where(valid, indices, size), True)
    if group.place is None:
        return chosen[:, :size] & group.valid if state.uneven else chosen[:, :size]
    batch, most = state.token_index.shape
    keep = torch.zeros(batch, most + 1, dtype=torch.bool, device=indices.device)
    sample, index = group.place
    keep[sample, torch.where(group.valid, index, most)] = chosen[:, :size] & group.valid
    return keep[:, :most]


def kept_counts(group: Groups, kept: list[int], state: TokenState, keep: torch.Tensor) -> Counts:
    """Tokens that each image has left, from the numbers that each group keeps.

    Groups that are whole samples of several images need a look at the tensor, the rest is known on the host.
    """
    per_sample: list[list[int]] = [[] for _ in state.counts]
    samples = [sample for sample, counts in enumerate(state.counts) for _ in range(len(counts))]
    if group.per == "image":
        for sample, count in zip(samples, kept, strict=True):
            per_sample[sample].append(count)
        return tuple(tuple(counts) for counts in per_sample)
    with_images = [sample for sample, counts in enumerate(state.counts) if counts]
    for sample, count in zip(with_images, kept, strict=True):
        if len(state.counts[sample]) == 1:
            per_sample[sample] = [count]
        else:
            flags = keep[sample, : sum(state.counts[sample])].tolist()
            first = 0
            for tokens in state.counts[sample]:
                per_sample[sample].append(sum(flags[first : first + tokens]))
                first += tokens
    return tuple(tuple(counts) for counts in per_sample)


def drop(state: TokenState, keep: torch.Tensor, counts: Counts) -> tuple[TokenState, torch.Tensor]:
    """Drops visual tokens and pads again on the side that the batch came with.

    Args:
        state: the present tokens.
        keep: bool ``(B, N)``, visual tokens to keep.
        counts: tokens that each image has left, as `keep` says.

    Returns:
        The new state, and int64 ``(B, S')``, the present columns that make it up (padding points at anything).
    """
    kept = (
        keep if not state.uneven else torch.where(state.visual_valid, keep, state.valid.gather(1, state.visual_index))
    )
    stays = state.valid.scatter(1, state.visual_index, kept)  # all different, also those that are not valid
    newlines, newlines_dropped = state.newlines, [0] * len(state.counts)
    if newlines is not None:
        ends = _newlines_that_stay(newlines, state, keep)
        if newlines.policy == "with-row":
            # On a device this is a look for each stage, in families with newlines.
            newlines_kept = tuple(ends.sum(1).tolist())
        else:
            newlines_kept = newlines.counts if newlines.policy == "always" else (0,) * len(newlines.counts)
        newlines_dropped = [before - after for before, after in zip(newlines.counts, newlines_kept, strict=True)]
        stays = stays & ~newlines.mask | ends
    lengths = tuple(
        tokens - sum(before) + sum(after) - lines
        for tokens, before, after, lines in zip(
            state.sample_lengths, state.counts, counts, newlines_dropped, strict=True
        )
    )
    new_length, left = max(lengths), state.side == "left"
    order = _in_order(stays, first=not left)
    take = order[:, order.shape[1] - new_length :] if left else order[:, :new_length]
    valid, visual = stays.gather(1, take), state.visual.gather(1, take)
    if any(length != new_length for length in lengths):
        visual = visual & valid
    totals = [sum(after) for after in counts]
    most = max(totals, default=0)
    uneven = any(total != most for total in totals)
    visual_valid = torch.ones(keep.shape[0], most, dtype=torch.bool, device=keep.device)
    if uneven:
        visual_valid = visual_valid.cumsum(1) <= upload(totals, keep.device, torch.int64)[:, None]
    return (
        TokenState(
            column=state.column.gather(1, take),
            valid=valid,
            visual=visual,
            visual_index=_true_first(visual, most),
            visual_valid=visual_valid,
            token_index=state.token_index.gather(1, _true_first(keep, most)),
            ranks=state.ranks,
            most_at_start=state.most_at_start,
            counts=counts,
            sample_lengths=lengths,
            started=state.started,
            side=state.side,
            newlines=None if newlines is None else _taken(newlines, take, valid, newlines_kept),
            tail=state.tail,
        ),
        take,
    )


def _newlines_that_stay(newlines: Newlines, state: TokenState, keep: torch.Tensor) -> torch.Tensor:
    """bool ``(B, S)``, by the policy."""
    if newlines.policy == "always":
        return newlines.mask
    if newlines.policy == "never":
        return torch.zeros_like(newlines.mask)
    rows = torch.zeros(keep.shape[0], newlines.rows + 1, dtype=torch.bool, device=keep.device)
    row = newlines.row_of.gather(1, state.token_index.clamp_max(max(newlines.row_of.shape[1] - 1, 0)))
    rows.scatter_(1, torch.where(keep, row, newlines.rows), True)
    return rows.gather(1, newlines.row) & newlines.mask


def _taken(newlines: Newlines, take: torch.Tensor, valid: torch.Tensor, counts: tuple[int, ...]) -> Newlines:
    mask = newlines.mask.gather(1, take) & valid
    return replace(newlines, mask=mask, row=newlines.row.gather(1, take), counts=counts)


def _true_first(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the first `count` True of each row, in rising order; other columns follow where there are fewer."""
    return _in_order(mask, first=True)[:, :count]


def _in_order(mask: torch.Tensor, *, first: bool) -> torch.Tensor:
    """Columns of each row of bool ``(B, n)``: those that are True first (or last), each kind in rising order."""
    if mask.device.type == "cpu":  # numpy's stable sort of bytes takes linear time
        flags = mask.numpy().view(np.uint8)
        return torch.from_numpy(np.argsort(1 - flags if first else flags, axis=1, kind="stable"))
    return mask.to(torch.int8).sort(dim=1, descending=first, stable=True).indices
