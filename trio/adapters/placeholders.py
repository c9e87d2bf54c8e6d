"""Reading placeholders: which of them belong to which picture."""

from __future__ import annotations

import torch

from trio.adapters.base import Layout
from trio.errors import InputError
from trio.origins import ImageTokens


def images_by_count(input_ids: torch.Tensor, token_id: int, image: ImageTokens) -> Layout:
    """Splits placeholders into pictures that all take the same number of tokens.

    Args:
        input_ids: int64 ``(B, S)`` on the CPU.
        token_id: the placeholder.
        image: the tokens of one picture.

    Raises:
        InputError: a sample's placeholders are not a multiple of the picture's tokens.
    """
    visual = input_ids == token_id
    samples = []
    for sample, found in enumerate(visual.sum(1).tolist()):
        count, rest = divmod(found, image.tokens)
        if rest:
            raise InputError(
                f"sample {sample}: found {found} image placeholders, but each picture takes {image.tokens}; "
                "the prompt may be cut within a picture (a chunked prefill, a truncated tokenisation): "
                "pass whole pictures in one forward"
            )
        samples.append((image,) * count)
    return Layout(visual, tuple(samples))
