"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, any Llama-like language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.configs import model_shape, read
from ..core.patches import PatchMap
from ..core.shape import ModelShape
from ..core.tokens import CLS, ImageTokens
from ..encoders.towers.find import tower_shape
from ..errors import UnsupportedModelError
from . import tiny
from .base import ADAPTERS, Adapter, PromptLayout
from .placeholders import images_by_count


@ADAPTERS.register("llava")
class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`: every image becomes the same number of tokens, in raster order.

    Under ``positions: auto`` survivors are renumbered (``compact``), as the released TRIO code for LLaVA does.
    """

    labels: ClassVar[Mapping[str, str]] = {"llava": "LLaVA-1.5"}
    model_types: ClassVar[frozenset[str]] = frozenset({"llava"})
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "one"

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """See `Adapter.cost_shape`: two matrices, on the features of one layer of the tower or of several."""
        chosen = getattr(config, "vision_feature_layer", -1)
        hidden, width = read(config.text_config, "hidden_size"), read(config.vision_config, "hidden_size")
        features = width * (1 if isinstance(chosen, int) else len(chosen))
        tower = tower_shape(config.vision_config)
        whole = getattr(config, "vision_feature_select_strategy", "full") == "full"  # "default" leaves the first out
        if tower.crop_patches is not None:
            tokens = tower.crop_patches + tower.prefix - int(not whole)
            tower = tower.model_copy(update={"crop_tokens": tokens})
        return model_shape(config, projector=((features, hidden), (hidden, hidden)), tower=tower)

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """See `Adapter.tiny_config`."""
        return tiny.llava(config)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a `LlavaForConditionalGeneration`."""
        from transformers import LlavaForConditionalGeneration

        return isinstance(model, LlavaForConditionalGeneration)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Each image takes as many placeholders as its grid has patches (and one for the class token if kept)."""
        config: Any = self.model.config
        return images_by_count(input_ids, config.image_token_id, self._image_tokens())

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """A token for each patch; a class token among them (`vision_feature_select_strategy: full`) is no patch."""
        if bool((image.kind == CLS).any()):
            raise UnsupportedModelError(
                "compressor: this model gives the class token to the language model with the patches "
                '(vision_feature_select_strategy "full"), which compressors do not handle; use stages alone'
            )
        return PatchMap.runs(image.tokens)

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """One for each image of the pixels."""
        shape = arguments.get("pixel_values")
        return len(images) if shape is None else int(shape[0])

    @property
    def projected_blocks(self) -> tuple[int, ...]:
        """The layer or layers that `vision_feature_layer` names."""
        config: Any = self.model.config
        chosen, depth = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
        # Hidden states start with the embeddings: number i is what block i - 1 gives.
        blocks = tuple(n if n < 0 else n - 1 - depth for n in ([chosen] if isinstance(chosen, int) else chosen))
        return blocks if all(-depth <= block < 0 for block in blocks) else ()

    def _image_tokens(self) -> ImageTokens:
        config: Any = self.model.config
        vision = config.vision_config
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            raise UnsupportedModelError(
                f"llava adapter: the vision tower {type(self.vision_tower).__name__} has image_size {size!r} and "
                f"patch_size {patch!r}; whole numbers are needed to lay out its tokens: use a CLIP or SigLIP tower"
            )
        side = size // patch
        # SigLIP has no class token, so "full" and "default" differ only where the tower has one.
        has_cls = hasattr(getattr(self._embeddings(), "class_embedding", None), "shape")
        with_cls = has_cls and config.vision_feature_select_strategy == "full"
        return ImageTokens.from_grid(side, side, leading_cls=with_cls)

    def _embeddings(self) -> nn.Module | None:
        tower: Any = self.vision_tower
        return getattr(getattr(tower, "vision_model", tower), "embeddings", None)
