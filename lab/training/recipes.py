"""What each model of the zoo is made of: configuration, model and processor, all stock transformers classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lab.training.vocabulary import build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Sizes and training amounts of one model.

    Attributes:
        name: Name in the zoo.
        size: Width and height of the training images.
        cell: Grid cell of the scenes, in pixels.
        patch: Patch size in pixels.
        tower_width: Width of the vision tower.
        tower_layers: Its layers; the model reads the one before the last.
        width: Width of the language model.
        heads: Its attention heads.
        layers: Its layers.
        tower_minutes: Default training time of the tower.
        language_minutes: Default training time of the projector and the language model.
        seed: Default seed of weights and scenes.
    """

    name: str = "tiny-llava"
    size: tuple[int, int] = (168, 168)
    cell: int = 56
    patch: int = 14
    tower_width: int = 128
    tower_layers: int = 5
    width: int = 160
    heads: int = 5
    layers: int = 8
    tower_minutes: float = 14.0
    language_minutes: float = 60.0
    seed: int = 0


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (Recipe(), Recipe("tiny-llava-seed1", seed=1))}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised model of this recipe."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.tower_width,
        intermediate_size=3 * recipe.tower_width,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=recipe.tower_width // 32,
        image_size=recipe.size[0],
        patch_size=recipe.patch,
        projection_dim=recipe.tower_width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 5 // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    make: Any = LlavaConfig
    config = make(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=(recipe.size[0] // recipe.patch) ** 2,
        tie_word_embeddings=False,
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config)
    settings: Any = GenerationConfig
    model.generation_config = settings(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
        do_sample=False,
    )
    return model


def build_processor(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """The processor that goes with the model."""
    tokenizer = tokenizer or build_tokenizer()
    height = recipe.size[1]
    images = CLIPImageProcessor(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": recipe.size[0]},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    make: Any = LlavaProcessor
    processor: LlavaProcessor = make(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which the strategy takes away again
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )
    return processor
