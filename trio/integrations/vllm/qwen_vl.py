"""Qwen2-VL and Qwen2.5-VL in vLLM, compressed behind the merger; each survivor keeps its own position."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.tokens import ImageTokens
from ...errors import UnsupportedModelError
from .encoding import EncodedItem, compress_items
from .llava import REMEMBERED
from .mrope import placed, prompt_positions, split_places, with_places
from .processing import FIELD, SpecProcessor, spec_of_field
from .settings import KEY, EngineSpec, ServedFamily, read_spec

FAMILY = ServedFamily(
    "Qwen-VL", "original", "positions of such a model have rows and columns, which renumbering would move"
)

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object


class QwenProcessor(SpecProcessor):
    """Lays out prompts with as many places for an image as its spec leaves."""

    family = FAMILY

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prunes = _prunes(self.info.ctx.get_mm_config())
        _check(self._prunes, self.default_spec)

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        return sum(spec.counts([stock]))

    def _images(self, data: Any) -> int:
        return len(data["image_grid_thw"]) if self.pixels in data else 0

    def _spec(self, options: Any) -> EngineSpec | None:
        spec = super()._spec(options)
        _check(self._prunes, spec)
        return spec


class QwenModel(_Base):
    """Mixed into a model of vLLM: compresses images, and numbers what is left.

    Attributes:
        places_tokens: whether the runner has to ask for positions when it gathers features.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model: Any = self
        prunes = _prunes(vllm_config.model_config.get_multimodal_config())
        self.places_tokens = not prunes
        _check(prunes, read_spec(getattr(model.config, KEY, None), FAMILY))
        self.trio_indices: deque[torch.Tensor] = deque(maxlen=REMEMBERED)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of images, each compressed by the spec of its request, their places behind them."""
        model: Any = self
        fields: Any = kwargs.pop(FIELD, None)
        if fields is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]  # vLLM's own
        inputs = model._parse_and_validate_image_input(**kwargs)
        merge = model.visual.spatial_merge_size
        grids = inputs["image_grid_thw"].tolist()
        pixels = torch.split(inputs["pixel_values"], [frames * height * width for frames, height, width in grids])
        items = []
        for field, rows, grid, own in zip(fields, model._process_image_input(inputs), grids, pixels, strict=True):
            image = ImageTokens.from_grid(grid[1] // merge, grid[2] // merge, size=merge**2)
            every = torch.arange(image.tokens)
            items.append(EncodedItem(spec_of_field(field, FAMILY), image, [every], rows, [own]))
        left = compress_items(items, None)
        self.trio_indices.extend(one.indices for one in left)
        out = []
        for one, grid in zip(left, grids, strict=True):
            columns = grid[2] // merge
            out.append(with_places(one.features, one.indices // columns, one.indices % columns))
        return tuple(out)

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> Any:
        """Positions of a prompt, see `prompt_positions`."""
        model: Any = self
        left = {
            one.mm_position.offset: one.mm_position.length
            for one in mm_features
            if one.data is not None and FIELD in one.data
        }
        if not left:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]  # vLLM's own
        return prompt_positions(len(input_tokens), list(model.iter_mm_grid_thw(mm_features)), left)

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
        width = model.config.text_config.hidden_size
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


@MULTIMODAL_REGISTRY.register_processor(
    TrioQwen2_5VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TrioQwen2_5VLForConditionalGeneration(QwenModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""


@MULTIMODAL_REGISTRY.register_processor(
    TrioQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TrioQwen2VLForConditionalGeneration(QwenModel, Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's own, whose images have the tokens that their specs leave."""
