"""TRIO's saliency as the released code computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from ..core.part import Choice
from .base import SCORERS
from .objective_gradient import ObjectiveGradient


@SCORERS.register("trio")
class Trio(ObjectiveGradient):
    """`objective-gradient` with the rows of the released code, ocy1/TRIO (arXiv 2602.04657).

    The four rows in front of the last prompt token are supervised: the code shifts the logits by one before it counts
    from the end. The paper's figure has the last row among them: ``rows: prompt-end``. The released code for Qwen
    applies the layer that has just run once more, and the input embedding as output head: ``probe_layer: last, head:
    input-embedding``.

    Parameters:
        positions: supervised rows, at most, counted back from the end (paper and code: 4).
        rows: see `objective-gradient`.
        skip: see `objective-gradient`.
        probe_layer: see `objective-gradient`.
        head: see `objective-gradient`.
    """

    positions: Annotated[int, Field(ge=1)] = 4
    rows: Literal["after-picture", "prompt-end", "released"] = "released"

    @classmethod
    def search_space(cls) -> Mapping[str, Choice] | None:
        """None: every value of its parameters is searched in `objective-gradient`."""
        return None
