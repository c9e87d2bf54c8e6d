"""LLaVA-1.5 in vLLM, compressed between the tower and the projector."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.tokens import ImageTokens
from ...errors import UnsupportedModelError
from .encoding import EncodedItem, compress_items
from .processing import FIELD, SpecProcessor, spec_of_field
from .settings import KEY, EngineSpec, ServedFamily, read_spec

FAMILY = ServedFamily(
    "LLaVA",
    "compact",
    "vLLM numbers the tokens of such a model without gaps, from their place in the prompt",
)
#: Images whose kept tokens a model remembers, for those who look (`trio.testing.engines`).
REMEMBERED = 1024


class TrioLlavaProcessor(SpecProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]  # vLLM has no types here
    """Lays out prompts with as many places for an image as its spec leaves."""

    family = FAMILY

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """See `SpecProcessor.tokens_left`."""
        return sum(spec.counts([stock]))


def _processor(info: Any, dummy_inputs: Any, **options: Any) -> Any:
    if isinstance(info, LlavaProcessingInfo):
        return TrioLlavaProcessor(info, dummy_inputs, **options)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs, **options)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=_build_llava_or_pixtral_hf_info, dummy_inputs=LlavaDummyInputsBuilder
)
class TrioLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]  # no types here
    """vLLM's own, whose images have the tokens that their specs leave."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        read_spec(getattr(self.config, KEY, None), FAMILY)
        self.trio_indices: deque[torch.Tensor] = deque(maxlen=REMEMBERED)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of images, each compressed by the spec of its request."""
        fields: Any = kwargs.pop(FIELD, None)
        if fields is None:
            return super().embed_multimodal(**kwargs)
        pixels: Any = kwargs["pixel_values"]
        features = self._process_image_pixels(self._parse_and_validate_image_input(**kwargs))
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        if features.shape[1] != side * side:
            raise UnsupportedModelError(
                f"{KEY}: the tower gives {features.shape[1]} tokens by image for a grid of {side} by {side}; models "
                'whose class token goes to the language model (vision_feature_select_strategy "full") are not supported'
            )
        image = ImageTokens.from_grid(side, side)
        items = [
            EncodedItem(spec_of_field(field, FAMILY), image, [torch.arange(image.tokens)], rows, [one])
            for field, rows, one in zip(fields, features, pixels, strict=True)
        ]
        left = compress_items(items, self.multi_modal_projector)
        self.trio_indices.extend(one.indices for one in left)
        return tuple(one.features for one in left)
