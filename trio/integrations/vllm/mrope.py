"""Positions with time, row and column for images that lost tokens: each survivor keeps its own.

vLLM numbers a prompt before its images are encoded, when it is not yet known which tokens are left. What does not
depend on that is numbered at once, exactly: the text, which counts on behind an image from the larger side of its
whole grid. So a request whose images are all found in the prefix cache needs nothing more. Rows and columns of tokens
that are left travel behind their features, and are put into the prompt when the runner gathers them, also in parts of
an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

#: Channels behind the features: row and column, each in two digits, since bfloat16 holds whole numbers to 256 only.
CHANNELS = 4
_BASE = 128


def with_places(features: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Features ``(m, D)`` with their places behind them, ``(m, D + CHANNELS)``.

    Args:
        features: of the tokens that are left.
        row: int64 ``(m,)``.
        column: int64 ``(m,)``.
    """
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], 1)
    return torch.cat([features, digits.to(features)], 1)


def split_places(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `with_places` joined: features ``(m, width)``, and int64 ``(m, 3)`` of time (0), row and column."""
    digits = rows[:, width:].long()
    row, column = digits[:, 0] * _BASE + digits[:, 1], digits[:, 2] * _BASE + digits[:, 3]
    return rows[:, :width], torch.stack([torch.zeros_like(row), row, column], 1)


def prompt_positions(
    length: int, grids: Sequence[tuple[int, int, int, int, float]], left: Mapping[int, int]
) -> tuple[torch.Tensor, int]:
    """Positions of a prompt in which some images have lost tokens.

    Args:
        length: tokens of the prompt.
        grids: of each image (or video), in order: place in the prompt, frames, rows, columns, and what frames count.
        left: tokens that are left, by place, of images that lost some. They all get the image's first position here.

    Returns:
        int64 ``(3, length)``, and what has to be added to a token's number behind the prompt.
    """
    parts: list[np.ndarray[Any, Any]] = []
    at = position = 0
    for place, frames, rows, columns, factor in grids:
        text = place - at
        parts.append(np.broadcast_to(np.arange(text), (3, text)) + position)
        start = position + text
        grid = np.indices((frames, rows, columns)).reshape(3, -1)
        if factor != 1.0:
            grid[0] = (grid[0] * factor).astype(np.int64)
        count = left.get(place)
        parts.append(grid + start if count is None else np.full((3, count), start))
        at = place + parts[-1].shape[1]
        position = start + int(grid.max()) + 1
    rest = length - at
    parts.append(np.broadcast_to(np.arange(rest), (3, rest)) + position)
    positions = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int64))
    return positions, int(positions.max()) + 1 - length if rest else position - length


def placed(
    ids: torch.Tensor, media: Sequence[int], positions: torch.Tensor, places: Sequence[torch.Tensor], done: int
) -> torch.Tensor:
    """The positions of a prompt, with those of gathered tokens put in.

    Args:
        ids: int64 ``(n,)``, the prompt.
        media: ids that stand for images and videos.
        positions: int64 ``(3, n)``, as `prompt_positions` made them; text is not changed.
        places: for each gathered part of an image or a video, in order, int64 ``(m, 3)`` of time, row and column; -1
            where its positions are right already.
        done: tokens of the prompt that are computed already; the gathered parts follow them.
    """
    if not places:
        return positions
    relative = torch.cat(list(places)).to(positions.device)
    is_media = torch.isin(ids, torch.tensor(list(media), device=ids.device)).to(positions.device)
    columns = is_media.nonzero().squeeze(1)
    columns = columns[columns >= done][: len(relative)]
    every = torch.arange(len(ids), device=positions.device)
    # The token in front of an image is text, whose position is exact.
    front = torch.where(is_media, -1, every).cummax(0).values[columns]
    start = torch.where(front >= 0, positions[:, front.clamp_min(0)].amax(0) + 1, 0)
    out = positions.clone()
    out[:, columns] = torch.where(relative[:, 0] >= 0, relative.T + start, positions[:, columns])
    return out
