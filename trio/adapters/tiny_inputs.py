"""Inputs for tiny models, from their configurations alone: no processor, no tokenizer, images of noise."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.prompts import Inputs, InputsFactory, Prompt, Side
from ..core.upstream import MASK, default_model
from ..errors import InputError
from .tiles import best_resolution, tiled_image

#: Tokens that stand for words end before these two, which stand behind rows and images; ids of configurations
#: come later.
WORDS = 90
BREAK, END = 92, 93
#: Height and width of images by their number, in sides of a tile.
SIZES = [(1.0, 1.0), (1.25, 2.25), (2.5, 1.0625), (1.875, 1.875), (0.5625, 2.5)]


@dataclass(frozen=True)
class TinyInputs:
    """An inputs factory (`trio.testing.InputsFactory`) from what one image of a family is.

    Attributes:
        tokens: the ids that an image takes in the prompt, by its number.
        collate: the tensors of images, by their numbers in the order of the batch.
        finish: what is made of the whole batch.
    """

    tokens: Callable[[int], list[int]]
    collate: Callable[[list[int]], Inputs]
    finish: Callable[[Inputs], Inputs] = lambda batch: batch

    def __call__(self, prompts: Sequence[Prompt], *, side: Side = "left") -> Inputs:
        """See `InputsFactory.__call__`."""
        rows = [
            [1] + [t for part in prompt.parts for t in (self.tokens(part) if isinstance(part, int) else words(part))]
            for prompt in prompts
        ]
        images = [number for prompt in prompts for number in prompt.images]
        return self.finish({**padded(rows, side), **(self.collate(images) if images else {})})


def tiny_inputs(config: Any, dtype: torch.dtype = torch.float32) -> InputsFactory:
    """Inputs for a tiny model (see `trio.adapters.tiny`), by its configuration's `model_type`.

    Args:
        config: of the model.
        dtype: of the pixels.

    Raises:
        InputError: the type of the model is not known here.
    """
    make = MAKERS.get(config.model_type)
    if make is None:
        raise InputError(
            f"inputs: found a configuration of type {config.model_type!r}; known are {', '.join(MAKERS)}: pass an "
            "inputs factory of your own (trio.testing.InputsFactory)"
        )
    return make(config, dtype)


def words(text: str) -> list[int]:
    """An id for each word, from its checksum."""
    return [2 + zlib.crc32(word.encode()) % WORDS for word in text.split()]


def noise(number: int, *shape: int) -> torch.Tensor:
    """An image's pixels, the same for the same number."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def padded(rows: list[list[int]], side: Side) -> Inputs:
    """`input_ids` and `attention_mask` ``(B, S)`` of rows of ids."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row), 1
    return {"input_ids": ids, MASK: mask}


def stacked(images: list[torch.Tensor]) -> torch.Tensor:
    """Images ``(n, ...)`` with different n, filled up with zeros."""
    most = max(len(image) for image in images)
    return torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in images])


def size_of(number: int, tile: int) -> tuple[int, int]:
    """Height and width of an image in pixels."""
    height, width = SIZES[number % len(SIZES)]
    return int(height * tile), int(width * tile)


def _images_argument(model_type: str) -> str:
    """What a model calls the pixels of its images: Video-LLaVA had a name of its own up to transformers 5.20."""
    own = "pixel_values_images"
    return own if own in inspect.signature(default_model(model_type)[0].forward).parameters else "pixel_values"


# Families


def _one_grid(config: Any, dtype: torch.dtype) -> TinyInputs:
    """Each image is one grid of patches."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    name = _images_argument(config.model_type)
    return TinyInputs(
        lambda number: [config.image_token_id] * side**2,
        lambda numbers: {
            name: torch.stack([noise(n, 3, vision.image_size, vision.image_size) for n in numbers]).to(dtype)
        },
    )


def _tiled(config: Any, dtype: torch.dtype) -> TinyInputs:
    """The whole image, then its tiles."""
    tile, points = config.vision_config.image_size, config.image_grid_pinpoints
    side = tile // config.vision_config.patch_size
    aspect = getattr(config, "vision_aspect_ratio", None)
    most = None if aspect is None else int(str(aspect).removeprefix("anyres_max_"))

    def tiles(number: int) -> int:
        height, width = best_resolution(size_of(number, tile), points)
        return 1 + int(height // tile * (width // tile))

    def collate(numbers: list[int]) -> Inputs:
        return {
            "pixel_values": stacked([noise(n, tiles(n), 3, tile, tile) for n in numbers]).to(dtype),
            "image_sizes": torch.tensor([size_of(n, tile) for n in numbers]),
        }

    def tokens(number: int) -> list[int]:
        image = tiled_image(size_of(number, tile), points, tile=tile, side=side, most_tiles=most)
        return [config.image_token_id] * image.tokens

    return TinyInputs(tokens, collate)


def _patch_merger(config: Any, dtype: torch.dtype) -> TinyInputs:
    """Images of any grid, neighbouring patches merged."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    kind = "vision" if hasattr(config, "vision_start_token_id") else "image"
    start, end = (int(getattr(config, f"{kind}_{border}_token_id")) for border in ("start", "end"))

    def grid(number: int) -> tuple[int, int, int]:
        height, width = size_of(number, 2)
        return 1, max(height, 2) * merge, max(width, 2) * merge

    def tokens(number: int) -> list[int]:
        _, height, width = grid(number)
        return [start] + [config.image_token_id] * (height * width // merge**2) + [end]

    def collate(numbers: list[int]) -> Inputs:
        grids = torch.tensor([grid(n) for n in numbers])
        features = vision.in_channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        pixels = [noise(n, int(shape.prod()), features) for n, shape in zip(numbers, grids, strict=True)]
        return {"pixel_values": torch.cat(pixels).to(dtype), "image_grid_thw": grids}

    def finish(batch: Inputs) -> Inputs:
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == config.image_token_id).long()}

    return TinyInputs(tokens, collate, finish)


def _ernie(config: Any, dtype: torch.dtype) -> TinyInputs:
    """As Qwen's, and for each token whose experts it goes to."""
    merged = _patch_merger(config, dtype)

    def finish(batch: Inputs) -> Inputs:
        batch = merged.finish(batch)
        return {**batch, "moe_mm_token_type_ids": batch["mm_token_type_ids"]}

    return replace(merged, finish=finish)


def _by_sample(config: Any, dtype: torch.dtype) -> TinyInputs:
    """Pixels are laid out by sample; samples with fewer images are filled up with zeros."""
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size // config.scale_factor

    def collate(numbers: list[int]) -> Inputs:
        return {"pixel_values": torch.stack([noise(n, 3, size, size) for n in numbers]).to(dtype)}

    def finish(batch: Inputs) -> Inputs:
        if "pixel_values" not in batch:
            return batch
        counts = (batch["input_ids"] == config.image_token_id).sum(1) // side**2
        return {**batch, "pixel_values": stacked(list(torch.split(batch["pixel_values"], counts.tolist())))}

    return TinyInputs(lambda number: [BREAK, *[config.image_token_id] * side**2, END], collate, finish)


def _rows(config: Any, dtype: torch.dtype) -> TinyInputs:
    """A token behind each row, and another behind the image."""
    patch = config.vision_config.patch_size * config.spatial_merge_size

    def size(number: int) -> tuple[int, int]:
        return patch * (2 + number % 2), patch * (2 + number % 3)

    def tokens(number: int) -> list[int]:
        height, width = (side // patch for side in size(number))
        return [
            token
            for row in range(height)
            for token in [*[config.image_token_id] * width, BREAK if row + 1 < height else END]
        ]

    def collate(numbers: list[int]) -> Inputs:
        pixels = torch.zeros(len(numbers), 3, 4 * patch, 4 * patch)
        for place, number in enumerate(numbers):
            height, width = size(number)
            pixels[place, :, :height, :width] = noise(number, 3, height, width)
        return {"pixel_values": pixels.to(dtype), "image_sizes": torch.tensor([size(n) for n in numbers])}

    return TinyInputs(tokens, collate)


MAKERS: Mapping[str, Callable[[Any, torch.dtype], TinyInputs]] = {
    "deepseek_vl": _one_grid,
    "ernie4_5_vl_moe": _ernie,
    "glm46v": _patch_merger,
    "glm4v": _patch_merger,
    "glm4v_moe": _patch_merger,
    "glm_ocr": _patch_merger,
    "idefics3": _by_sample,
    "janus": _one_grid,
    "lighton_ocr": _rows,
    "llava": _one_grid,
    "llava_next": _tiled,
    "llava_onevision": _tiled,
    "mistral3": _rows,
    "qwen2_5_vl": _patch_merger,
    "qwen2_vl": _patch_merger,
    "qwen3_vl": _patch_merger,
    "smolvlm": _by_sample,
    "video_llava": _one_grid,
    "vipllava": _one_grid,
}
