"""Inputs for the conformance suites from a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.prompts import InputsFactory, Prompt, Side
from ..errors import InputError


@dataclass(frozen=True)
class ProcessorInputs:
    """Inputs from a transformers processor, through its chat template where it has one.

    Attributes:
        processor: with a tokenizer and an image processor.
        size: width and height of the images that are drawn, in pixels.
    """

    processor: Any
    size: tuple[int, int] = (224, 224)

    def __call__(self, prompts: Sequence[Prompt], *, side: Side = "left") -> Mapping[str, Any]:
        """See `InputsFactory.__call__`."""
        images = [draw_image(number, self.size) for prompt in prompts for number in prompt.images]
        tokenizer = self.processor.tokenizer
        before, padding = tokenizer.padding_side, tokenizer.pad_token
        tokenizer.padding_side = side
        if padding is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            out: Mapping[str, Any] = self.processor(
                text=[self._text(prompt) for prompt in prompts],
                images=images or None,
                padding=True,
                return_tensors="pt",
            )
        finally:
            tokenizer.padding_side = before
            if padding is None:
                tokenizer.pad_token = None
        return out

    def _text(self, prompt: Prompt) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [
                {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in prompt.parts
            ]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        token = getattr(self.processor, "image_token", None)
        if token is None:
            raise InputError(
                f"processor: {type(self.processor).__name__} has neither a chat_template nor an image_token; pass an "
                "inputs factory (trio.testing.InputsFactory) in its place"
            )
        return " ".join(str(token) if isinstance(part, int) else part for part in prompt.parts)


def draw_image(number: int, size: tuple[int, int] = (224, 224)) -> Any:
    """An image of a few coloured rectangles on noise (`PIL.Image`, RGB), the same for the same number."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(number)
    width, height = size
    pixels = generator.integers(90, 160, (height, width, 3))
    for _ in range(6):
        top, left = generator.integers(0, height * 3 // 4), generator.integers(0, width * 3 // 4)
        high, wide = generator.integers(height // 8, height // 2), generator.integers(width // 8, width // 2)
        pixels[top : top + high, left : left + wide] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def as_factory(inputs: InputsFactory | Any) -> InputsFactory:
    """An inputs factory, made from a processor where that is given."""
    if hasattr(inputs, "tokenizer") and hasattr(inputs, "image_processor"):
        return ProcessorInputs(inputs)
    if callable(inputs):
        factory: InputsFactory = inputs
        return factory
    raise InputError(
        f"inputs: found a {type(inputs).__name__}; pass the model's processor, or a function that takes prompts and a "
        "padding side (trio.testing.InputsFactory)"
    )
