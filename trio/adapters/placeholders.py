"""Reading placeholders: which of them belong to which image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..core.backbone import FEATURE_COUNTS
from ..core.tokens import ImageTokens
from ..errors import InputError
from .base import PromptLayout


def images_by_count(input_ids: torch.Tensor, token_id: int, image: ImageTokens) -> PromptLayout:
    """Splits placeholders into images that all take the same number of tokens.

    Args:
        input_ids: int64 ``(B, S)`` on the CPU.
        token_id: the placeholder.
        image: the tokens of one image.

    Raises:
        InputError: a sample's placeholders are not a multiple of the image's tokens.
    """
    visual = input_ids == token_id
    samples = []
    for sample, placeholders in enumerate(visual.sum(1).tolist()):
        count, rest = divmod(placeholders, image.tokens)
        if rest:
            raise InputError(
                f"sample {sample}: found {placeholders} image placeholders, but each image takes {image.tokens}; "
                "the prompt may be cut within an image (a chunked prefill, a truncated tokenisation): "
                "pass whole images in one forward"
            )
        samples.append((image,) * count)
    return PromptLayout(visual, tuple(samples))


def images_in_order(
    input_ids: torch.Tensor, streams: Mapping[int, Sequence[ImageTokens]], modalities: Mapping[int, str] | None = None
) -> PromptLayout:
    """Hands images of known sizes out to the placeholders, in the order of the batch.

    Beam search repeats every sample, and its images with it, after they were encoded: where a stream fits the
    placeholders of the batch a whole number of times, that many neighbouring samples share their images.

    Args:
        input_ids: int64 ``(B, S)`` on the CPU.
        streams: for each placeholder (images, video frames) the images of the batch in order.
        modalities: for each placeholder what encoded it; by default all are images.

    Raises:
        InputError: the placeholders do not fit the images.
    """
    visual = torch.zeros_like(input_ids, dtype=torch.bool)
    by_sample: list[list[tuple[int, ImageTokens, str]]] = [[] for _ in range(input_ids.shape[0])]
    for token_id, stream in streams.items():
        modality = "image" if modalities is None else modalities[token_id]
        here = input_ids == token_id
        visual |= here
        given, placeholders = sum(image.tokens for image in stream), int(here.sum())
        if placeholders == 0 and given == 0:
            continue
        repeats, rest = divmod(placeholders, given) if given else (0, placeholders)
        if rest or not repeats or input_ids.shape[0] % max(repeats, 1):
            raise InputError(
                f"placeholders: the batch has {placeholders} with id {token_id}, the encoded images give {given} "
                "tokens; the prompt may be cut within an image, or its features were computed while the pipeline was "
                "not attached: pass pixels, and whole images in one forward"
            )
        remaining = iter(stream)
        for first in range(0, input_ids.shape[0], repeats):
            columns = here[first].nonzero().squeeze(1).tolist()
            taken = 0
            while taken < len(columns):
                image = next(remaining)
                for row in range(first, first + repeats):
                    by_sample[row].append((columns[taken], image, modality))
                taken += image.tokens
            if taken != len(columns):
                raise InputError(
                    f"sample {first}: its {len(columns)} placeholders with id {token_id} end within an image; the "
                    "prompt may be cut, or images and samples are in different orders: pass whole images"
                )
    rows = [sorted(row, key=_column) for row in by_sample]
    return PromptLayout(
        visual,
        tuple(tuple(image for _, image, _ in row) for row in rows),
        tuple(tuple(modality for _, _, modality in row) for row in rows),
    )


def _column(entry: tuple[int, ImageTokens, str]) -> int:
    return entry[0]


def runs_of_tiles(input_ids: torch.Tensor, token_id: int, tile: ImageTokens) -> PromptLayout:
    """Takes every unbroken run of placeholders for one image, made of tiles with the same number of tokens.

    Args:
        input_ids: int64 ``(B, S)`` on the CPU.
        token_id: the placeholder.
        tile: the tokens of one tile.

    Raises:
        InputError: a run is not a whole number of tiles.
    """
    visual = input_ids == token_id
    samples = []
    for sample, row in enumerate(visual):
        columns = row.nonzero().squeeze(1)
        breaks = (columns.diff() != 1).nonzero().squeeze(1) + 1
        images = []
        for run in columns.tensor_split(breaks.tolist()) if len(columns) else ():
            count, rest = divmod(len(run), tile.tokens)
            if rest:
                raise InputError(
                    f"sample {sample}: a run of {len(run)} image placeholders is no whole number of tiles of "
                    f"{tile.tokens}; the prompt may be cut within an image: pass whole images in one forward"
                )
            # How several tiles lie on the image is known to the processor only.
            images.append(tile if count == 1 else replace(ImageTokens.join([tile] * count), placed=False))
        samples.append(tuple(images))
    return PromptLayout(visual, tuple(samples))


def images_by_features(
    input_ids: torch.Tensor, placeholders: Mapping[str, int], encoded: Mapping[str, Mapping[str, Any]]
) -> PromptLayout:
    """Hands out images that have as many tokens as the encoder gave each of them; their grids are a single row.

    Args:
        input_ids: int64 ``(B, S)`` on the CPU.
        placeholders: by modality; no two share one.
        encoded: by modality, as `Adapter.layout` gets it.

    Raises:
        InputError: what the encoder gave each image is not known, or does not fit the placeholders.
    """
    streams = {
        token: [unplaced(rows) for rows in image_rows(encoded[modality])] if modality in encoded else []
        for modality, token in placeholders.items()
    }
    return images_in_order(input_ids, streams, {token: modality for modality, token in placeholders.items()})


def unplaced(tokens: int) -> ImageTokens:
    """An image of which nothing is known but the number of its tokens."""
    return replace(ImageTokens.from_grid(1, tokens), placed=False)


def image_rows(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows of features that the encoder gave each image, images without any left out.

    Args:
        arguments: of the last call of the encoder method, with what it returned (see `FEATURE_COUNTS`).

    Raises:
        InputError: that cannot be told.
    """
    rows = arguments.get(FEATURE_COUNTS)
    if rows is None:
        raise InputError(
            "images: where one ends and the next begins is not known, because the encoder returned neither a list of "
            "features nor a tensor (images, tokens, width), or was not called while the pipeline was attached; pass "
            "pixels, or write an adapter (docs/add-an-adapter.md)"
        )
    return tuple(int(count) for count in rows if count)


def encoded_argument(encoded: Mapping[str, Mapping[str, Any]], modality: str, name: str) -> Any:
    """An argument of the last call of an encoder method.

    Raises:
        InputError: the encoder was not called while the pipeline was attached, or not with that argument.
    """
    arguments = encoded.get(modality, {})
    if name not in arguments:
        raise InputError(
            f"{name}: the sizes of the images are not known, because their features were computed while the pipeline "
            "was not attached; pass pixels, and let the model encode them while it is"
        )
    return arguments[name]
