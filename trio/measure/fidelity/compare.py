"""How alike two answers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..extras import require
from ..teacher import kl


@dataclass(frozen=True)
class Likeness:
    """One sample, full against compressed.

    Attributes:
        top1: whether the most probable first token is the same.
        kl: KL(full || compressed) of the first token's distribution, in nats, 0 or more.
        exact: whether the greedy answers are the same text.
        edit: similarity of the greedy answers, 0 to 1: see `edit_similarity`.
    """

    top1: bool
    kl: float
    exact: bool
    edit: float


def compare(
    full: torch.Tensor, other: torch.Tensor, full_answers: list[str], other_answers: list[str]
) -> list[Likeness]:
    """Compares the answers to a batch of prompts.

    Args:
        full: logits of the first token ``(B, V)`` with all visual tokens.
        other: the same of the compressed model.
        full_answers: B texts.
        other_answers: B texts.
    """
    same = (full.argmax(-1) == other.argmax(-1)).tolist()
    divergence = kl(full, other).tolist()
    return [
        Likeness(top1, nats, one == two, edit_similarity(one, two))
        for top1, nats, one, two in zip(same, divergence, full_answers, other_answers, strict=True)
    ]


def edit_similarity(one: str, two: str) -> float:
    """1 minus Levenshtein's distance by characters over the length of the longer text; 1.0 for two empty ones.

    Raises:
        InputError: rapidfuzz is not installed.
    """
    similarity: float = require("rapidfuzz.distance", "edit similarity").Levenshtein.normalized_similarity(one, two)
    return similarity
