"""Prompts that say where images stand, and what makes tensors of them: for conformance suites and canaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Side = Literal["left", "right"]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """A prompt: texts, and numbers that stand for images.

    The same number is the same image, whatever batch it comes in.

    Example:
        ``Prompt("What differs between", 1, "and", 2, "?")``
    """

    parts: tuple[str | int, ...]

    def __init__(self, *parts: str | int) -> None:
        """A prompt from its parts, in order."""
        object.__setattr__(self, "parts", parts)

    @property
    def images(self) -> tuple[int, ...]:
        """The images, in order."""
        return tuple(part for part in self.parts if isinstance(part, int))


class InputsFactory(Protocol):
    """Makes what a model's forward takes."""

    def __call__(self, prompts: Sequence[Prompt], *, side: Side = "left") -> Mapping[str, Any]:
        """A padded batch.

        Args:
            prompts: one for each sample. A prompt must give the same tokens and the same images in any batch.
            side: where padding goes.

        Returns:
            `input_ids` and `attention_mask` ``(B, S)``, and what else the model's forward takes. Tensors that belong to
            images have them in the order of the prompts along their first dimension.
        """
