"""A tiny LLaVA with random weights: something to run scorers and examples on without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.prompts import Prompt, Side
from ..core.upstream import MASK

IMAGE_TOKEN = 99
VOCABULARY = 100
#: Rows and columns of visual tokens that each image takes.
GRID = 4


def tiny_llava(*, layers: int = 6, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> Any:
    """A `LlavaForConditionalGeneration` of a few thousand random parameters, with a CLIP tower and a Llama.

    Args:
        layers: decoder layers.
        dtype: of the weights.
        attention: transformers' name of the attention implementation.
        seed: of the weights.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=GRID * 4,
        patch_size=4,
    )
    config: Any = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # so that attention is far from uniform
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class TokenInputs:
    """Inputs without a tokenizer: each word becomes a token by its checksum, each image is noise.

    Attributes:
        image_token: id of the placeholder.
        image_tokens: placeholders that an image takes.
        image_shape: shape of an image's pixels.
        words: ids from 3 up to this one stand for words.
    """

    image_token: int = IMAGE_TOKEN
    image_tokens: int = GRID**2
    image_shape: tuple[int, ...] = (3, GRID * 4, GRID * 4)
    words: int = VOCABULARY - 5

    def __call__(self, prompts: Sequence[Prompt], *, side: Side = "left") -> Mapping[str, Any]:
        """See `trio.testing.InputsFactory`."""
        rows = [self._row(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[place, where] = torch.tensor(row)
            mask[place, where] = 1
        batch = {"input_ids": ids, MASK: mask}
        numbers = [number for prompt in prompts for number in prompt.images]
        if numbers:
            batch["pixel_values"] = torch.stack([self._pixels(number) for number in numbers])
        return batch

    def _row(self, prompt: Prompt) -> list[int]:
        row = [1]
        for part in prompt.parts:
            if isinstance(part, int):
                row += [self.image_token] * self.image_tokens
            else:
                row += [3 + zlib.crc32(word.encode()) % (self.words - 3) for word in part.split()]
        return row

    def _pixels(self, number: int) -> torch.Tensor:
        return torch.randn(self.image_shape, generator=torch.Generator().manual_seed(number))
