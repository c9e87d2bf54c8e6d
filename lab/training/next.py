"""``tiny-llava-next``: LLaVA-NeXT's tiles on images of many sizes, grown out of ``tiny-llava``.

The tower learns what tiles show (things larger than it knew, and cut) and what the squeezed whole image shows; then
the language model learns to read both, with the weights of ``tiny-llava`` as the start.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lab.training.language import Branches, Grown, Trainee
from lab.training.recipes import Recipe, build_model, build_processor
from lab.training.tower import dense_labels, pixels
from trio import zoo
from trio.measure.shapesvqa.scenes import Scene, Split
from trio.measure.shapesvqa.views import tile, varied_scene, whole

NEXT = Recipe(name="tiny-llava-next", tower_minutes=6.0, language_minutes=40.0)


def pinpoints(recipe: Recipe) -> list[list[int]]:
    """Height and width of the canvases of tiles: two side by side, two on top of each other, four."""
    side = recipe.size[0]
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def build_next(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """A randomly initialised model of this recipe."""
    plain: Any = build_model(recipe, tokenizer)
    make: Any = LlavaNextConfig
    config = make(
        vision_config=plain.config.vision_config,
        text_config=plain.config.text_config,
        image_token_index=plain.config.image_token_index,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_grid_pinpoints=pinpoints(recipe),
        image_seq_length=plain.config.image_seq_length,
        tie_word_embeddings=False,
    )
    model: LlavaNextForConditionalGeneration = LlavaNextForConditionalGeneration(config)
    model.generation_config = plain.generation_config
    return model


def image_settings(recipe: Recipe) -> dict[str, Any]:
    """Settings of the image processor."""
    side = recipe.size[0]
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "image_grid_pinpoints": pinpoints(recipe),
    }


def build_next_processor(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaNextProcessor:
    """The processor that goes with the model."""
    plain: Any = build_processor(recipe, tokenizer)
    make: Any = LlavaNextProcessor
    processor: LlavaNextProcessor = make(
        image_processor=LlavaNextImageProcessorPil(**image_settings(recipe)),
        tokenizer=plain.tokenizer,
        patch_size=recipe.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which the strategy takes away again
        chat_template=plain.tokenizer.chat_template,
        image_token="<image>",
    )
    return processor


def warm_start(model: Any, source: str = "tiny-llava") -> None:
    """Take tower, projector and language model from a trained model of the zoo."""
    trained: Any = zoo.load(source)[0]
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    model.model.language_model.load_state_dict(trained.model.language_model.state_dict())
    model.lm_head.load_state_dict(trained.lm_head.state_dict())
    with torch.no_grad():
        model.model.image_newline.zero_()  # no word at first


def tile_grid(recipe: Recipe, scene: Scene) -> tuple[int, int]:
    """Rows and columns of tiles that the processor chooses for an image."""
    side = recipe.size[0]
    height, width = select_best_resolution((scene.image.height, scene.image.width), pinpoints(recipe))
    return height // side, width // side


class Views(Dataset[dict[str, Tensor]]):
    """Whole images, squeezed, and tiles, with dense labels."""

    def __init__(self, recipe: Recipe, split: Split, seed: int, start: int, length: int) -> None:
        """Set up; arguments as for ``lab.training.tower.PatchData``."""
        self.recipe, self.split, self.seed, self.start, self.length = recipe, split, seed, start, length

    def __len__(self) -> int:
        """Number of views."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A view: the whole image or one of its tiles, whichever comes out of the draw."""
        index += self.start
        scene = varied_scene(self.split, self.seed, index)
        rng = random.Random(f"trio-views/{self.split}/{self.seed}/{index}")
        if rng.random() < 0.6:
            rows, cols = tile_grid(self.recipe, scene)
            places = [(row, col) for row in range(rows) for col in range(cols)]
            rng.shuffle(places)
            for row, col in places:
                seen = tile(scene, self.recipe.size[0], (rows, cols), row, col)
                if seen.items:
                    break
        else:
            seen = whole(scene, self.recipe.size)
        return {"pixels": pixels(seen)} | dense_labels(seen, self.recipe.patch)


class TileBranches(Branches):
    """Scenes on canvases of many sizes, ``group`` in a row on the same one, so that a batch needs no padding."""

    group = 8

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Set up; arguments as for ``Branches``."""
        super().__init__(*arguments, **options)
        self.processor: Any = LlavaNextImageProcessorPil(**image_settings(self.recipe))

    def _scene(self, index: int) -> Scene:
        return varied_scene("train", self.seed, index, index // self.group)

    def _lesson(self, scene: Scene) -> Scene:
        return whole(scene, self.recipe.size)

    def _image_inputs(self, scene: Scene) -> dict[str, Tensor]:
        found = self.processor(scene.image, return_tensors="pt")
        return {"pixels": found["pixel_values"][0], "sizes": found["image_sizes"][0]}


class TileTrainee(Trainee):
    """Tower, projector, unpadding and newlines are the model's own."""

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """Visual tokens: the squeezed whole image, then the tiles row by row with their newlines."""
        found = self.model.model.get_image_features(batch["pixels"], batch["sizes"], return_dict=True)
        return torch.stack(tuple(found.pooler_output))


TILES = Grown(TileBranches, TileTrainee, lambda progress: 0.25 if progress < 0.5 else 0.1)
"""How the language model of ``tiny-llava-next`` is trained."""
