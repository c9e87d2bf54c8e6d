"""Which code builds and trains which model of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from lab.training.absorption import DEPTHS, EARLY, LATE
from lab.training.absorption import SOURCE as DEPTH_SOURCE
from lab.training.absorption import warm_start as depth_start
from lab.training.language import Grown, Parts, llava_parts
from lab.training.next import NEXT, TILES, Views, build_next, build_next_processor, warm_start
from lab.training.qwen import (
    EYES,
    QWEN_VL,
    SIZES,
    MergedPatches,
    build_qwen,
    build_qwen_processor,
    build_qwen_tokenizer,
    qwen_parts,
)
from lab.training.qwen import warm_start as qwen_start
from lab.training.recipes import RECIPES, Recipe, build_model, build_processor
from lab.training.vocabulary import build_tokenizer


@dataclass(frozen=True)
class Family:
    """How a model of the zoo comes about.

    Attributes:
        recipe: Its sizes and training times.
        model: Makes it, randomly initialised.
        processor: Makes its processor.
        tokenizer: Makes its tokenizer.
        warm_start: Takes what it can from a model that is already trained; None for one trained from nothing.
        source: Name of that model.
        parts: Finds its tower and its projector.
        tower: Further arguments of ``train_tower``; None for a tower that stays as the source has it.
        language: Further arguments of ``train_language``.
        grown: What its language phase does differently; None for one trained from nothing.
    """

    recipe: Recipe
    model: Callable[[Recipe, PreTrainedTokenizerFast], Any] = build_model
    processor: Callable[[Recipe, PreTrainedTokenizerFast], Any] = build_processor
    tokenizer: Callable[[], PreTrainedTokenizerFast] = build_tokenizer
    warm_start: Callable[[Any], None] | None = None
    source: str | None = None
    parts: Parts = llava_parts
    tower: dict[str, Any] | None = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    grown: Grown | None = None


FAMILIES: dict[str, Family] = {name: Family(recipe) for name, recipe in RECIPES.items()} | {
    NEXT.name: Family(
        NEXT,
        build_next,
        build_next_processor,
        warm_start=warm_start,
        source="tiny-llava",
        tower={"patches": Views, "rate": 1.5e-3, "heads_first": 60},
        language={"batch_size": 8, "rate": 1e-3},
        grown=TILES,
    ),
    QWEN_VL.name: Family(
        QWEN_VL,
        build_qwen,
        build_qwen_processor,
        build_qwen_tokenizer,
        warm_start=qwen_start,
        source="tiny-llava",
        parts=qwen_parts,
        tower={"patches": MergedPatches, "eyes": EYES, "batch_size": 16},
        language={"batch_size": 8, "rate": 1e-3},
        grown=SIZES,
    ),
    **{
        recipe.name: Family(
            recipe,
            warm_start=depth_start,
            source=DEPTH_SOURCE,
            tower=None,
            language={"rate": 1e-3},
            grown=DEPTHS[recipe.name],
        )
        for recipe in (EARLY, LATE)
    },
}
"""By name in the zoo."""


def family_of(recipe: Recipe) -> Family:
    """The family of a recipe; LLaVA-1.5's where the recipe is not one of the zoo's."""
    return FAMILIES.get(recipe.name, Family(recipe))
