"""What methods are compared with: an even spread of tokens below, the objects asked about above."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr

from ...core.context import LayerContext
from ...core.tokens import ImageTokens
from ...cost import ModelShape
from ...errors import InputError
from ...scorers.base import Scorer
from .task import LabelledSample

__all__ = ["Oracle", "UniformGridScorer"]


class UniformGridScorer(Scorer):
    """A floor that looks at nothing but places: tokens spread evenly over the image.

    Saliency falls with the rank in a farthest-point order of the grid, so that any k best ones are spread evenly. The
    order starts in the middle; each next token is the one farthest from all before it, ties to the lower index. The
    tokens that a later stage keeps are a part of those that an earlier one kept.
    """

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values from -(n - 1) to 0 for an image of n tokens."""
        return _by_rank(ctx, [[r for image in images for r in spread_order(image)] for images in ctx.images])

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """None: places are known before."""
        return 0


class Oracle(Scorer):
    """A ceiling that knows what the question is about: it keeps the tokens of those things.

    The things take turns, each giving its most covered token that is left; what is left of the count is spread evenly
    over the image. It is no upper bound: a model may need something else, and questions about what is not there have
    no thing.
    """

    _samples: Sequence[LabelledSample] = PrivateAttr(default=())

    def show(self, samples: Sequence[LabelledSample]) -> None:
        """Says which questions the next forward is about, one for each row of the batch."""
        self._samples = samples

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values from -(n - 1) to 0 for a sample of n tokens."""
        if len(ctx.images) != len(self._samples):
            raise InputError(
                f"oracle: the forward brings {len(ctx.images)} prompts and {len(self._samples)} questions were shown; "
                "call `show` with the questions of the batch first."
            )
        ranks = []
        for sample, images in zip(self._samples, ctx.images, strict=True):
            if len(images) != 1 or sample.item_map is None:
                raise InputError("oracle: it needs one image a question, and a map of what is where in it.")
            ranks.append(oracle_order(images[0], sample.item_map, sample.about))
        return _by_rank(ctx, ranks)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """None: it knows."""
        return 0


def _by_rank(ctx: LayerContext, ranks: Sequence[Sequence[int]]) -> torch.Tensor:
    most = max(1, *(len(row) for row in ranks), 1)
    table = torch.zeros(len(ranks), most)
    for row, values in zip(table, ranks, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.float32)
    scores = -table.to(ctx.hidden.device).gather(1, ctx.token_index)
    return scores.masked_fill(~ctx.visual_valid, float("-inf"))


def spread_order(image: ImageTokens) -> tuple[int, ...]:
    """Rank of each token in a farthest-point order of their places, from 0."""
    return _spread(tuple(image.row.tolist()), tuple(image.column.tolist()))


@cache
def _spread(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    places = torch.tensor([rows, columns], dtype=torch.float32).T
    away = torch.cdist(places, places)
    chosen = int((places - places.mean(0)).norm(dim=1).argmin())
    nearest, ranks = away[chosen].clone(), [0] * len(rows)
    nearest[chosen] = -1.0
    for rank in range(1, len(rows)):
        chosen = int(nearest.argmax())
        ranks[chosen] = rank
        nearest = torch.minimum(nearest, away[chosen])
        nearest[chosen] = -1.0
    return tuple(ranks)


def oracle_order(image: ImageTokens, item_map: NDArray[np.uint8], about: Sequence[int]) -> list[int]:
    """Rank of each token where the things asked about come first, from 0.

    Args:
        image: the tokens.
        item_map: uint8 ``(height, width)``, i + 1 where thing i is.
        about: numbers of the things.
    """
    queues = []
    for thing in about:
        covered = _covered(image, item_map == thing + 1)
        queues.append([int(i) for i in np.argsort(-covered, kind="stable") if covered[i] > 0])
    order: dict[int, None] = {}
    for turn in range(max(map(len, queues), default=0)):
        order.update((queue[turn], None) for queue in queues if turn < len(queue))
    order.update((i, None) for i in np.argsort(spread_order(image), kind="stable").tolist())
    ranks = [0] * len(order)
    for rank, token in enumerate(order):
        ranks[token] = rank
    return ranks


def _covered(image: ImageTokens, occupied: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of each token's cell that a thing covers."""
    total = np.zeros((occupied.shape[0] + 1, occupied.shape[1] + 1))
    total[1:, 1:] = occupied.cumsum(0, dtype=np.float64).cumsum(1)
    frames = image.frame.numpy().clip(max=len(image.grids) - 1)
    rows, columns = (np.array([grid[axis] for grid in image.grids])[frames] for axis in (0, 1))
    row, column = image.row.numpy(), image.column.numpy()
    top, bottom = (
        np.round((row + d) * occupied.shape[0] / rows).astype(int).clip(0, occupied.shape[0]) for d in (0, 1)
    )
    left, right = (
        np.round((column + d) * occupied.shape[1] / columns).astype(int).clip(0, occupied.shape[1]) for d in (0, 1)
    )
    area = np.maximum(1, (bottom - top) * (right - left))
    inside: Any = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    share: NDArray[np.float64] = inside / area
    return share
