"""An adapter of one's own, in one file outside the package: ``python examples/my_adapter.py``.

The family is ViP-LLaVA, which the package does not know by name. ``docs/add-an-adapter.md`` explains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

import trio
from trio.adapters import tiny
from trio.adapters.base import PromptLayout
from trio.adapters.placeholders import images_by_count
from trio.core.configs import model_shape
from trio.core.shape import ModelShape
from trio.core.tokens import ImageTokens
from trio.encoders.towers import tower_shape


@trio.ADAPTERS.register("vip-llava")
class VipLlavaAdapter(trio.Adapter):
    """`VipLlavaForConditionalGeneration`: each image is one grid of patches, in raster order."""

    model_types = frozenset({"vipllava"})

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """Two matrices, on the features of several layers of the tower."""
        tower, hidden = tower_shape(config.vision_config), config.text_config.hidden_size
        features = tower.hidden * len(config.vision_feature_layers)
        return model_shape(config, projector=((features, hidden), (hidden, hidden)), tower=tower)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether the model is a ViP-LLaVA."""
        return isinstance(model, VipLlavaForConditionalGeneration)

    @classmethod
    def tiny_config(cls, config: Any) -> Any:
        """A small copy of a ViP-LLaVA's configuration, for releases of transformers that were not tested."""
        return tiny.llava(config)

    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Every image takes the same number of placeholders: the tower's grid, without the class token."""
        config: Any = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return images_by_count(input_ids, config.image_token_id, ImageTokens.from_grid(side, side))


def tiny_model() -> VipLlavaForConditionalGeneration:
    """A model of this family with a few thousand random parameters: enough to check an adapter."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 6, "eos_token_id": None, **small}
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 16, "patch_size": 4, **small}
    config = VipLlavaConfig(text_config=text, vision_config=tower, image_token_index=99, vision_feature_layers=[-2, -1])
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # else attention is so even that wrong rows or masks do not show
    return model


def main() -> None:
    """Checks the seven promises on a model of this family."""
    from trio.testing import TokenInputs, check_adapter

    # 16 placeholders with id 99 for each image of 16 x 16 pixels; with a real checkpoint, pass its processor.
    inputs = TokenInputs(image_token=99, image_tokens=16, image_shape=(3, 16, 16))
    results = check_adapter(tiny_model(), inputs, on_check=print)
    print(f"{results.subject}: {len(results)} checks passed")


if __name__ == "__main__":
    main()
