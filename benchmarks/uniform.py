"""A floor that looks at nothing but places: tokens spread evenly over the picture."""

from __future__ import annotations

from functools import cache

import torch

import trio


class UniformGrid(trio.Scorer):
    """Saliency falls with the rank in a farthest-point order of the grid, so that any k best ones are spread evenly.

    The order starts in the middle; each next token is the one farthest from all before it, ties to the lower index.
    The tokens that a later stage keeps are a part of those that an earlier one kept.
    """

    def score(self, ctx: trio.LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values from -(n - 1) to 0 for an image of n tokens."""
        ranks = torch.zeros(len(ctx.images), max(1, *(sum(i.tokens for i in images) for images in ctx.images), 1))
        for sample, images in enumerate(ctx.images):
            flat = [
                rank for image in images for rank in _ranks(tuple(image.row.tolist()), tuple(image.column.tolist()))
            ]
            ranks[sample, : len(flat)] = torch.tensor(flat, dtype=torch.float32)
        scores = -ranks.to(ctx.hidden.device).gather(1, ctx.origin)
        return scores.masked_fill(~ctx.visual_valid, float("-inf"))


@cache
def _ranks(rows: tuple[int, ...], columns: tuple[int, ...]) -> list[int]:
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
    return ranks
