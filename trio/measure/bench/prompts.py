"""Batches to measure on: an image and some text, for a model that was built or with a checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...core.images import batch_for
from ...core.upstream import MASK
from ...encoders.resizing import Goal, resizing_processor
from .architectures import Architecture, Size, SizedImage

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePrompts", "NoisePrompts", "Prompts"]

#: Ids of words: below all special ones of the architectures, above the first few that tokenizers reserve.
_FIRST_WORD, _WORDS = 10, 1000
#: Shares of an image's side that are tried in place of the whole one.
_SHARES = tuple(step / 16 for step in range(16, 1, -1))


class Prompts(Protocol):
    """Makes batches on the CPU, all samples of one length."""

    @property
    def sizes(self) -> Sequence[Size]:
        """Sizes of images, largest first; the first is the one that is measured."""

    @property
    def larger(self) -> Sequence[Size]:
        """Sizes above the measured one that may be tried, smallest first."""

    def batch(self, samples: int, size: Size | None = None) -> Mapping[str, Any]:
        """What the model's forward takes: so many samples, each with an image of that size (None: the first)."""

    def visual(self, size: Size) -> int:
        """Visual tokens of an image of that size, without tokens that end its rows."""

    def resized(self, samples: int, goal: Goal) -> tuple[Mapping[str, Any], int]:
        """As `batch`, with the measured image resized (see `trio.encoders.resizing`), and its visual tokens."""

    def text(self, samples: int, length: int) -> Mapping[str, Any]:
        """Prompts of so many words without an image."""


@dataclass(frozen=True)
class NoisePrompts:
    """Images of noise and words at random, for a model that was built from an architecture.

    Attributes:
        architecture: of the model.
        config: of the model.
        text_tokens: words of a prompt beside the image.
        largest: size to begin with; None: the architecture's default.
    """

    architecture: Architecture
    config: Any
    text_tokens: int = 64
    largest: Size | None = None

    @property
    def sizes(self) -> Sequence[Size]:
        """See `Prompts.sizes`."""
        if self.largest is None:
            return self.architecture.sizes
        area = self.largest[0] * self.largest[1]
        return (self.largest, *(size for size in self.architecture.sizes if size[0] * size[1] < area))

    @property
    def larger(self) -> Sequence[Size]:
        """See `Prompts.larger`."""
        area = self.sizes[0][0] * self.sizes[0][1]
        return [size for size in reversed(self.architecture.sizes) if size[0] * size[1] > area]

    def batch(self, samples: int, size: Size | None = None) -> Mapping[str, Any]:
        """See `Prompts.batch`."""
        image = self._image(size or self.sizes[0])
        words = _words(samples, self.text_tokens)
        ahead = max(1, self.text_tokens // 8)  # as a system prompt stands in front of the image
        middle = torch.tensor([image.ids]).expand(samples, -1)
        made = _text(torch.cat([words[:, :ahead], middle, words[:, ahead:]], 1))
        if "qwen" in self.config.model_type:
            made["mm_token_type_ids"] = (made["input_ids"] == self.config.image_token_id).long()
        return {**made, **image.tensors(samples)}

    def visual(self, size: Size) -> int:
        """See `Prompts.visual`."""
        return self._image(size).visual

    def resized(self, samples: int, goal: Goal) -> tuple[Mapping[str, Any], int]:
        """See `Prompts.resized`; the nearest one of `sizes`."""
        wanted = goal(self.visual(self.sizes[0]))
        size = min(self.sizes, key=lambda one: abs(self.visual(one) - wanted))
        return self.batch(samples, size), self.visual(size)

    def text(self, samples: int, length: int) -> Mapping[str, Any]:
        """See `Prompts.text`."""
        return _text(_words(samples, length))

    def _image(self, size: Size) -> SizedImage:
        return self.architecture.image(self.config, size)


@dataclass(frozen=True)
class ImagePrompts:
    """An image and a question through a checkpoint's own processor.

    Attributes:
        processor: of the model.
        image: as RGB.
        question: about it.
    """

    processor: Any
    image: Image
    question: str

    @property
    def sizes(self) -> Sequence[Size]:
        """See `Prompts.sizes`; which of them give fewer tokens is the processor's affair."""
        width, height = self.image.size
        scaled = [(max(1, round(height * share)), max(1, round(width * share))) for share in _SHARES]
        return tuple(dict.fromkeys(scaled))

    @property
    def larger(self) -> Sequence[Size]:
        """See `Prompts.larger`."""
        return [(round(self.image.height * share), round(self.image.width * share)) for share in (1.5, 2.0, 3.0)]

    def batch(self, samples: int, size: Size | None = None) -> Mapping[str, Any]:
        """See `Prompts.batch`."""
        image = self._scaled(size or self.sizes[0])
        made: Mapping[str, Any] = dict(batch_for(self.processor, [([image], self.question)] * samples))
        return made

    def visual(self, size: Size) -> int:
        """See `Prompts.visual`; counted by what a smaller image takes off the prompt."""
        made: int = batch_for(self.processor, [([self._scaled(size)], self.question)])["input_ids"].shape[1]
        return made - self._without_image()

    def resized(self, samples: int, goal: Goal) -> tuple[Mapping[str, Any], int]:
        """See `Prompts.resized`."""
        processor = resizing_processor(self.processor, goal)
        made: Mapping[str, Any] = dict(batch_for(processor, [([self.image], self.question)] * samples))
        return made, made["input_ids"].shape[1] - self._without_image()

    def text(self, samples: int, length: int) -> Mapping[str, Any]:
        """See `Prompts.text`."""
        ids = torch.as_tensor(batch_for(self.processor, [([], self.question)])["input_ids"])
        repeats = -(-length // ids.shape[1])
        return _text(ids.repeat(samples, repeats)[:, :length])

    def _without_image(self) -> int:
        """Tokens of the prompt where it has no image."""
        return int(batch_for(self.processor, [([], self.question)])["input_ids"].shape[1])

    def _scaled(self, size: Size) -> Image:
        return self.image if size == (self.image.height, self.image.width) else self.image.resize((size[1], size[0]))


def _words(samples: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_FIRST_WORD, _FIRST_WORD + _WORDS, (samples, length), generator=generator)


def _text(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, MASK: torch.ones_like(ids)}
