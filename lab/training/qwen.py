"""``tiny-qwen2.5-vl``: dynamic resolution and M-RoPE, with a windowed tower of its own.

The tower is trained from nothing on dense labels, and its merged patches learn to say them in the words that the
language model of ``tiny-llava`` already reads. Where a patch is, its features do not say: that the language model
learns anew, from the positions of M-RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lab.training.language import Branches, Grown, Trainee
from lab.training.loop import console
from lab.training.recipes import Recipe
from lab.training.tower import IGNORE, DenseHeads, Eyes, dense_labels, pixels, tower_output
from lab.training.vocabulary import QWEN, build_tokenizer
from trio import zoo
from trio.measure.shapesvqa.scenes import Scene, Split, draw_scene
from trio.measure.shapesvqa.views import varied_scene, whole

MERGE = 2
QWEN_VL = Recipe(
    name="tiny-qwen2.5-vl", patch=7, tower_width=80, tower_layers=4, tower_minutes=14.0, language_minutes=40.0
)
LEAST, MOST = 144, 324
"""Visual tokens of an image; the processor scales images to have as many."""


def build_qwen(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised model of this recipe."""
    start, image, video, end = (tokenizer.convert_tokens_to_ids(token) for token in QWEN)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    make: Any = Qwen2_5_VLConfig
    config = make(
        vision_config={
            "depth": recipe.tower_layers,
            "hidden_size": recipe.tower_width,
            "intermediate_size": 2 * recipe.tower_width,
            "num_heads": recipe.tower_width // 40,
            "patch_size": recipe.patch,
            "spatial_merge_size": MERGE,
            "window_size": 8 * recipe.patch,
            "out_hidden_size": recipe.width,
            "fullatt_block_indexes": [1, recipe.tower_layers - 1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.width,
            "intermediate_size": recipe.width * 5 // 2,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.heads,
            "max_position_embeddings": 4096,
            # a short base, so that the frequencies of the columns, the lowest, tell twenty columns apart
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        }
        | special,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    model: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration(config)
    settings: Any = GenerationConfig
    model.generation_config = settings(
        **special, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16, do_sample=False
    )
    return model


def qwen_images(recipe: Recipe) -> Any:
    """The image processor."""
    unit = (recipe.patch * MERGE) ** 2
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": LEAST * unit, "longest_edge": MOST * unit},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        patch_size=recipe.patch,
        merge_size=MERGE,
        temporal_patch_size=2,
    )


def build_qwen_processor(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen2_5_VLProcessor:
    """The processor that goes with the model."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # needs torchvision

    tokenizer = tokenizer or build_tokenizer(qwen=True)
    images = qwen_images(recipe)
    videos: Any = Qwen2VLVideoProcessor
    make: Any = Qwen2_5_VLProcessor
    processor: Qwen2_5_VLProcessor = make(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos(
            size=dict(images.size),
            image_mean=images.image_mean,
            image_std=images.image_std,
            patch_size=recipe.patch,
            merge_size=MERGE,
        ),
        chat_template=tokenizer.chat_template,
    )
    return processor


def qwen_parts(model: Any) -> tuple[nn.Module, nn.Module]:
    """Tower and merger."""
    return model.model.visual, model.model.visual.merger


def warm_start(model: Any, source: str = "tiny-llava") -> None:
    """Take the language model from a trained model of the zoo; biases start at zero, Qwen's tokens small."""
    trained: Any = zoo.load(source)[0]
    wanted = trained.model.language_model.state_dict()
    table, head = wanted.pop("embed_tokens.weight"), trained.lm_head.weight
    model.model.language_model.load_state_dict(wanted, strict=False)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.bias.zero_()
        model.model.language_model.embed_tokens.weight[: len(table)] = table
        model.lm_head.weight[: len(head)] = head


def patch_words(source: str = "tiny-llava", scenes: int = 192) -> dict[str, Tensor]:
    """How a trained model's projector says shape, colour and digit: for each class a vector, fitted by least squares.

    What it says about rows and columns is fitted, too, and left out. The vector of the background is the sum of all
    means.
    """
    model: Any = zoo.load(source)[0]
    drawn = [draw_scene("train", 4000, i) for i in range(scenes)]
    labels = [dense_labels(scene, 14) for scene in drawn]
    with torch.no_grad():
        seen = [
            tower_output(model, torch.stack([pixels(s) for s in drawn[i : i + 32]]))[0] for i in range(0, scenes, 32)
        ]
        features = model.model.multi_modal_projector(torch.cat(seen)).flatten(0, 1)
    numbers = {
        n: torch.stack([label[n] for label in labels]).flatten() for n in ("shape", "colour", "glyph", "row", "col")
    }
    clear = numbers["shape"] != IGNORE
    columns = {n: nn.functional.one_hot(v[clear]).float() for n, v in numbers.items()}
    design = torch.cat([columns[n] if n in ("row", "col") else columns[n][:, 1:] for n in columns], 1)
    weight = torch.where(numbers["shape"][clear] > 0, 1.0, 0.3).sqrt()[:, None]
    found = torch.linalg.lstsq(design * weight, features[clear] * weight, driver="gelsd").solution
    words, at = {}, 0
    for name, block in columns.items():
        size = block.shape[1] - (name not in ("row", "col"))
        words[name] = found[at : at + size]
        at += size
    zero = torch.zeros(1, features.shape[1])
    base = words["row"].mean(0) + words["col"].mean(0)
    tables = {n: torch.cat([zero, words[n]]) for n in ("shape", "colour", "glyph")}
    tables["shape"] = tables["shape"] + base
    return tables


class _Sized:
    """Scenes in groups on one canvas, as the image processor gives them."""

    def __init__(self, recipe: Recipe, group: int) -> None:
        self.recipe, self.group, self.processor = recipe, group, qwen_images(recipe)

    def scene(self, split: Split, seed: int, index: int) -> Scene:
        return varied_scene(split, seed, index, index // self.group)

    def image_inputs(self, scene: Scene) -> dict[str, Tensor]:
        tensors = self.processor(scene.image, return_tensors="pt")
        return {"pixels": tensors["pixel_values"], "grid": tensors["image_grid_thw"][0]}

    def lesson(self, scene: Scene) -> Scene:
        """The scene at the size that the tower sees."""
        rows, cols = self.image_inputs(scene)["grid"][1:].tolist()
        return whole(scene, (cols * self.recipe.patch, rows * self.recipe.patch))


class MergedPatches(Dataset[dict[str, Tensor]]):
    """Images with labels for merged patches, ``group`` in a row on the same canvas."""

    group = 16

    def __init__(self, recipe: Recipe, split: Split, seed: int, start: int, length: int) -> None:
        """Set up; arguments as for ``lab.training.tower.PatchData``."""
        self.split, self.seed, self.start, self.length = split, seed, start, length
        self.source = _Sized(recipe, self.group)

    def __len__(self) -> int:
        """Number of images."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """An image and its labels."""
        scene = self.source.scene(self.split, self.seed, self.start + index)
        side = self.source.recipe.patch * MERGE
        return self.source.image_inputs(scene) | dense_labels(self.source.lesson(scene), side)


def merged(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Merged patches of a batch of images of one size: (batch, tokens, width)."""
    found = model.model.visual(batch["pixels"].flatten(0, 1), grid_thw=batch["grid"])
    tokens: Tensor = found.pooler_output
    return tokens.view(len(batch["grid"]), -1, tokens.shape[-1])


def _see(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens = merged(model, batch)
    return tokens, tokens.mean(1)


EYES = Eyes(
    lambda model: (model.model.visual, list(model.model.visual.blocks)),
    lambda recipe: DenseHeads(recipe.width, None),
    _see,
)


class SizedBranches(Branches):
    """Scenes on canvases of many sizes, ``group`` in a row on the same one, so that a batch needs no padding."""

    group = 8

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Set up; arguments as for ``Branches``."""
        super().__init__(*arguments, **options)
        self.source, self.patch = _Sized(self.recipe, self.group), self.recipe.patch * MERGE

    def _scene(self, index: int) -> Scene:
        return self.source.scene("train", self.seed, index)

    def _lesson(self, scene: Scene) -> Scene:
        return self.source.lesson(scene)

    def _image_inputs(self, scene: Scene) -> dict[str, Tensor]:
        return self.source.image_inputs(scene)


class SizedTrainee(Trainee):
    """Merged patches between Qwen's tokens, at the positions of M-RoPE."""

    head_text = "user : <|vision_start|>"
    tail_text = "<|vision_end|>"

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """Visual tokens."""
        return merged(self.model, batch)

    def places(self, batch: dict[str, Tensor], prefix: int) -> Tensor:
        """Positions (3, batch, tokens): time, row and column."""
        grid, head = batch["grid"][0], len(self.head)
        images = self.model.model.get_vision_position_ids(head, grid, 1, MERGE)
        after = head + int(grid[1:].max()) // MERGE
        tail = torch.arange(len(self.tail)) + after
        start = torch.cat([torch.arange(head).expand(3, -1), images, tail.expand(3, -1)], 1)
        size = len(batch["ids"])
        rest = (after + len(self.tail) + batch["place"]).expand(3, -1, -1)
        return torch.cat([start[:, None].expand(3, size, -1), rest], 2)


def build_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with Qwen's tokens."""
    return build_tokenizer(qwen=True)


def qwen_dense(progress: float) -> float:
    """Share of dense exercises: they teach the new positions."""
    return 0.5 if progress < 0.4 else 0.1


@torch.no_grad()
def fit_merger(recipe: Recipe, model: Any, seed: int, groups: int = 8) -> float:
    """Set the merger's last layer so that patches say shape, colour and digit in words that the language model knows.

    By least squares, from the layer before; the words are those of ``patch_words``, the labels those that the tower was
    trained on. Returns the share of the words' power that is explained, 0 to 1.
    """
    layers, words = model.model.visual.merger.mlp, patch_words()
    last, layers[2] = layers[2], nn.Identity()  # so that the model gives what goes into it
    patches = MergedPatches(recipe, "train", seed + 1000, 0, groups * MergedPatches.group)
    known, wanted, weights = [], [], []
    for start in range(0, len(patches), patches.group):
        batch = default_collate([patches[start + i] for i in range(patches.group)])
        labels = {name: batch[name].flatten() for name in words}
        known.append(merged(model, batch).flatten(0, 1))
        wanted.append(torch.stack([words[name][v.clamp(min=0)] for name, v in labels.items()]).sum(0))
        weights.append(torch.where(labels["shape"] > 0, 1.0, 0.1) * (labels["shape"] != IGNORE))
    layers[2] = last
    x, y, weight = torch.cat(known), torch.cat(wanted), torch.cat(weights).sqrt()[:, None]
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    square = (design * weight).T @ (design * weight)
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square))
    found = torch.linalg.solve(square + ridge, (design * weight).T @ (y * weight))
    last.weight.copy_(found[:-1].T)
    last.bias.copy_(found[-1])
    left = ((design @ found - y) * weight).square().sum() / (y * weight).square().sum()
    console.print(f"merger: {1 - left.item():.3f} of the words' power explained")
    return 1 - float(left)


SIZES = Grown(SizedBranches, SizedTrainee, qwen_dense, fit_merger)
"""How the language model of ``tiny-qwen2.5-vl`` is trained."""
