"""Agreement at every position of the full model's answer, which is fed to both models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...core.record import Record
from ..statistics import Bootstrap, Estimate
from ..teacher import PositionAgreement

__all__ = ["BUCKETS", "PlaceAgreement", "PositionFidelity", "Positions"]

#: First and last position of each bucket, counted from 1; None: to the end of the answer.
BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 1), (2, 4), (5, 8), (9, None))


class PlaceAgreement(Record):
    """Agreement at some positions of the answers.

    Attributes:
        first: the first of them, counted from 1.
        last: the last one; None: to the end of each answer.
        tokens: positions of all answers together; each counts once.
        images: that have an answer as long as that.
        top1: share of positions where the most probable token is the full model's.
        kl: mean KL(full || compressed) of the next token's distribution, nats.
    """

    first: int = Field(ge=1)
    last: int | None
    tokens: int
    images: int
    top1: Estimate
    kl: Estimate

    @property
    def name(self) -> str:
        """Such as "token 1", "tokens 2 to 4" or "token 9 on"."""
        if self.last is None:
            return f"token {self.first} on"
        return f"token {self.first}" if self.last == self.first else f"tokens {self.first} to {self.last}"


class PositionFidelity(Record):
    """Agreement at the positions of the full model's answers, teacher-forced, the end token's included.

    Attributes:
        overall: all positions.
        buckets: the first token, tokens 2 to 4, 5 to 8, and from the 9th on, as far as answers go.
        by_position: each position alone.
    """

    overall: PlaceAgreement
    buckets: list[PlaceAgreement]
    by_position: list[PlaceAgreement]

    @property
    def worst(self) -> PlaceAgreement:
        """The bucket with the largest mean KL."""
        return max(self.buckets, key=lambda one: one.kl.mean)


class Positions:
    """The positions of the answers to a set of samples: where they are, and draws of them by image."""

    def __init__(self, lengths: Sequence[int], images: Sequence[str]) -> None:
        """Lays the positions of all answers side by side.

        Args:
            lengths: tokens of the full model's answer to each sample, 1 or more.
            images: name of each sample's image; those of one image are drawn together.
        """
        number = {name: index for index, name in enumerate(dict.fromkeys(images))}
        owners = [number[name] for name, length in zip(images, lengths, strict=True) for _ in range(length)]
        self._draws = Bootstrap(owners, one_by_one=True)
        self._place = np.concatenate([np.arange(1, length + 1) for length in lengths])

    def summarised(self, agreements: Sequence[PositionAgreement]) -> PositionFidelity:
        """Means with intervals over images of what was found for each sample."""
        top1 = np.array([float(same) for one in agreements for same in one.top1])
        kl = np.array([nats for one in agreements for nats in one.kl])

        def at(first: int, last: int | None) -> PlaceAgreement | None:
            chosen: NDArray[np.bool_] = (self._place >= first) & (self._place <= (last or self._place.max()))
            if not chosen.any():
                return None
            return PlaceAgreement(
                first=first,
                last=last,
                tokens=int(chosen.sum()),
                images=self._draws.scenes(chosen),
                top1=self._draws.mean(top1, chosen),
                kl=self._draws.number(kl, chosen),
            )

        overall = at(1, None)
        assert overall is not None  # every answer has a token
        singles = range(1, int(self._place.max()) + 1)
        return PositionFidelity(
            overall=overall,
            buckets=[found for bounds in BUCKETS if (found := at(*bounds)) is not None],
            by_position=[found for place in singles if (found := at(place, place)) is not None],
        )
