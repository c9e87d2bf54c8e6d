"""Qwen's models in vLLM, compressed behind the merger; each survivor keeps its own position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionAttention,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VisionAttention,
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.tokens import ImageTokens
from ...encoders.towers.base import Tower
from ...errors import UnsupportedModelError
from .encoding import CompressedItem, EncodedItem
from .models import ServedModel
from .mrope import placed, prompt_positions, split_places, with_places
from .processing import FIELD, SpecProcessor
from .seams import peers, unread
from .settings import KEY, EngineSpec, ServedFamily, ServedTower, read_spec
from .towers import ServedQwenTower, of_tokens

#: Of an image, or a frame: place in the prompt, frames, rows, columns, what frames count.
Grid = tuple[int, int, int, int, float]
_ORIGINAL = "positions of such a model have rows and columns, which renumbering would move"


class QwenProcessor(SpecProcessor):
    """Lays out prompts with as many places for an image as its spec leaves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prunes = _prunes(self.info.ctx.get_mm_config())
        _check(self._prunes, self.default_spec)

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        return sum(spec.counts([stock]))

    def sizes(self, height: int, width: int) -> list[int]:
        """See `SpecProcessor.sizes`."""
        found = self.info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=self.info.get_image_processor(), mm_kwargs={}
        )
        return [int(found)]

    @classmethod
    def family_of(cls, config: Any, multimodal: Any) -> ServedFamily:
        """See `SpecProcessor.family_of`."""
        vision = config.vision_config
        full = getattr(vision, "fullatt_block_indexes", None)
        why = unread(multimodal, Qwen2VisionAttention, Qwen2_5_VisionAttention, calls=("apply_rotary_emb", "attn"))
        tower = ServedTower(vision.depth, vision.depth, None if full is None else tuple(full), why)
        return ServedFamily("Qwen-VL", "original", _ORIGINAL, tower=tower)

    def _images(self, data: Any) -> int:
        return len(data["image_grid_thw"]) if self.pixels in data else 0

    def _spec(self, options: Any) -> EngineSpec | None:
        spec = super()._spec(options)
        _check(self._prunes, spec)
        return spec


class QwenModel(ServedModel):
    """Mixed into a model of vLLM: compresses images, and numbers what is left.

    Attributes:
        places_tokens: whether the runner has to ask for positions when it gathers features.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model: Any = self
        prunes = _prunes(vllm_config.model_config.get_multimodal_config())
        self.places_tokens = not prunes
        default = read_spec(getattr(model.config, KEY, None), self.family)
        _check(prunes, default)
        if default is not None and default.compressor.reads() and vllm_config.compilation_config.compile_mm_encoder:
            raise UnsupportedModelError(
                f"{KEY}: the spec's compressor reads the vision tower, which compile_mm_encoder hides; leave that out"
            )

    def get_encoder_cudagraph_config(self) -> Any:
        """Images are never encoded by a graph, which knows nothing of specs."""
        config: Any = super().get_encoder_cudagraph_config()  # type: ignore[misc]  # vLLM's own
        return dataclasses.replace(config, modalities=[one for one in config.modalities if one != "image"])

    def tower(self) -> Tower:
        """See `ServedModel.tower`."""
        model: Any = self
        return ServedQwenTower(model.visual, peers())

    def encoded(self, specs: Sequence[EngineSpec], inputs: Any) -> list[EncodedItem]:
        """See `ServedModel.encoded`."""
        model: Any = self
        merge = model.visual.spatial_merge_size
        grids = inputs["image_grid_thw"].tolist()
        pixels = torch.split(inputs["pixel_values"], [frames * height * width for frames, height, width in grids])
        features, values = self.heard(specs, lambda: model._process_image_input(inputs))
        width, items, first = model.config.text_config.hidden_size, [], 0
        for spec, rows, grid, own in zip(specs, features, grids, pixels, strict=True):
            image = ImageTokens.from_grid(grid[1] // merge, grid[2] // merge, size=merge**2)
            every = torch.arange(image.tokens)
            patches = torch.arange(first, first + len(own)).view(-1, merge**2)
            items.append(
                EncodedItem(
                    spec=spec,
                    image=image,
                    pieces=[every],
                    features=rows[:, :width],
                    pixels=[own],
                    signals=of_tokens(values, patches, spec),
                    later=rows[:, width:] if rows.shape[1] > width else None,
                )
            )
            first += len(own)
        return items

    def laid_out(self, item: EncodedItem, left: CompressedItem) -> torch.Tensor:
        """See `ServedModel.laid_out`: with the places behind the features."""
        columns = item.image.grids[0][1]
        return with_places(left.features, left.indices // columns, left.indices % columns)

    def grids(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> Iterable[Grid]:
        """See `prompt_positions`: the grids of images and videos of a prompt."""
        model: Any = self
        found: Iterable[Grid] = model.iter_mm_grid_thw(mm_features)
        return found

    @property
    def row_width(self) -> int:
        """Channels of a whole image's features."""
        model: Any = self
        return int(model.config.text_config.hidden_size)

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> Any:
        """Positions of a prompt, see `prompt_positions`."""
        left = {
            one.mm_position.offset: one.mm_position.length
            for one in mm_features
            if one.data is not None and FIELD in one.data
        }
        if not left:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]  # vLLM's own
        return prompt_positions(len(input_tokens), list(self.grids(input_tokens, mm_features)), left)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Takes the places off gathered features, and puts them into the positions of their prompt."""
        model: Any = self
        if not self.places_tokens:
            stock: Any = super()
            result: tuple[Sequence[torch.Tensor], torch.Tensor, int] = stock.recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return result
        width = self.row_width
        features, places = [], []
        for rows in multimodal_embeddings:
            if rows.shape[1] == width:  # a whole image, a video
                features.append(rows)
                places.append(torch.full((len(rows), 3), -1, dtype=torch.int64))
            else:
                own, place = split_places(rows, width)
                features.append(own)
                places.append(place.cpu())
        config = model.config
        ids = torch.as_tensor(input_ids, dtype=torch.int64)
        media = (config.image_token_id, config.video_token_id)
        positions = placed(ids, media, mrope_positions, places, num_computed_tokens)
        return features, positions, int(positions.max()) + 1 - len(ids)


def _prunes(config: Any) -> bool:
    """Whether vLLM's own pruning of videos is on, which uses the same seam."""
    return bool(config.is_multimodal_pruning_enabled())


def _check(prunes: bool, spec: EngineSpec | None) -> None:
    if prunes and spec is not None:
        raise UnsupportedModelError(
            f"{KEY}: found a spec and vLLM's own pruning of videos, which use one seam; leave video_pruning_rate out, "
            f"or the key {KEY!r}"
        )


class TrioQwen2_5VLProcessor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """For Qwen2.5-VL."""


class TrioQwen2VLProcessor(QwenProcessor, Qwen2VLMultiModalProcessor):  # type: ignore[misc]  # vLLM has no types here
    """For Qwen2-VL."""


class TrioQwen3VLProcessor(QwenProcessor, Qwen3VLMultiModalProcessor):  # type: ignore[misc]  # vLLM has no types here
    """For Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    TrioQwen2_5VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TrioQwen2_5VLForConditionalGeneration(QwenModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""

    reads_specs = TrioQwen2_5VLProcessor


@MULTIMODAL_REGISTRY.register_processor(
    TrioQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TrioQwen2VLForConditionalGeneration(QwenModel, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""

    reads_specs = TrioQwen2VLProcessor


@MULTIMODAL_REGISTRY.register_processor(
    TrioQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class TrioQwen3VLForConditionalGeneration(QwenModel, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave; DeepStack's features are merged with them."""

    reads_specs = TrioQwen3VLProcessor

    def grids(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> Iterable[Grid]:
        """See `QwenModel.grids`: each frame of a video by itself, with text between them."""
        model: Any = self
        config = model.config
        found = model._iter_mm_grid_hw(
            list(input_tokens),
            mm_features,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            spatial_merge_size=config.vision_config.spatial_merge_size,
        )
        return [(place, 1, rows, columns, 1.0) for place, rows, columns, _ in found]

    @property
    def row_width(self) -> int:
        """See `QwenModel.row_width`: DeepStack's features stand behind the others."""
        model: Any = self
        return int(model.visual_dim + model.multiscale_dim)
