"""`compress`: fewer visual tokens from a vision tower of one's own, without a language model of ours to know."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.tokens import ImageTokens, Signal, VisualTokens
from ..errors import InputError
from .compressors.base import Compressor
from .features import compress_tokens, kept_of, named_compressor
from .reading.reader import Reader, Reading
from .towers import Tower, tower_for

Images = torch.Tensor | Mapping[str, Any]


def compress(
    tower: nn.Module | Tower,
    images: Images,
    compressor: str | Mapping[str, Any] | type[Compressor] | Compressor = "visionzip-64",
    *,
    keep: int | str | None = None,
    layer: int | None = None,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[VisualTokens]:
    """Runs a vision tower on images and compresses what it gives.

    Args:
        tower: a vision tower of transformers, open_clip or timm, or a model that holds one; see docs/towers.md. It runs
            as it is; features carry no gradients back to it (they do to `project`).
        images: pixels ``(images, 3, height, width)`` as the tower takes them, or its own arguments by name (Qwen:
            `pixel_values` and `grid_thw`).
        compressor: a name with the number of tokens (``"visionzip-64"``), a name, a mapping with `name`, `keep` and
            parameters, a class or an object.
        keep: tokens to keep of each image, or a percentage such as ``"11.1%"``; not for compressors that decide.
        layer: block whose output makes the features, from the end where negative; None: what language models take of
            such a tower. Towers whose patches leave merged (Qwen's) give the merged ones, and take no layer.
        project: the projector, ``(n, D) -> (n, D')``, row by row. Compressors that compare tokens as the language model
            sees them (`Compressor.space`) do so after it; with None they compare the tower's features.

    Returns:
        The tokens left of each input of the tower (an image; a temporal frame of a video): features (projected where
        `project` is given), origins on the grid of the image, sizes, token_index and the merge map.

    Raises:
        UnknownNameError: no compressor of that name.
        UnsupportedModelError: the tower is not known, or does not give what the compressor reads.
        InputError: the number is missing or wrong, or the images do not fit the tower.
    """
    found = tower_for(tower)
    part, number_kept = named_compressor(compressor, keep)
    merged = found.patches_per_token > 1
    if merged and layer is not None:
        raise InputError(
            f"layer: found {layer}; the tokens of a {type(found.module).__name__} are made of several patches by its "
            "last step, so that no block has them; leave layer out"
        )
    block = found.features_block if layer is None else layer
    hidden, cls = Signal("hidden", block), Signal("cls", block)
    with_cls = part.wants_cls and found.has_cls and not merged
    wanted = [*part.reads(), *([] if merged else [hidden]), *([cls] if with_cls else [])]
    grids = found.grids(images)
    with Reader(found, wanted, keep=lambda patches: kept_of(number_kept, patches)) as reader:
        output = found.run(images)
        reading = reader.take()
    counts = [rows * columns for rows, columns in grids]
    if tuple(counts) != reading.inputs:
        raise InputError(
            f"images: the tower has {reading.inputs} patches by image, grids of {tuple(grids)} were expected; "
            "patches may not be dropped on the way"
        )
    rows = output.pooler_output if merged else reading.values[hidden]
    class_rows = reading.values[cls] if with_cls else [None] * len(grids)
    seeds = _seeds(images, counts) if part.draws else [0] * len(counts)  # pixels are copied to the host for it
    tokens, counted, first, per_token = [], [], 0, found.patches_per_token
    side = int(per_token**0.5)
    for number, (height, width) in enumerate(grids):
        n = counts[number] // per_token
        here = slice(first // per_token, first // per_token + n)
        signals = {one: _signal(one, reading, number, first, counts[number], per_token) for one in part.reads()}
        one_input = VisualTokens.start(
            rows[here],
            ImageTokens.from_grid(height // side, width // side, size=per_token),
            signals,
            class_token=class_rows[number],
            seed=seeds[number],
        )
        tokens.append(one_input)
        counted.append(kept_of(number_kept, n))
        first += counts[number]
    return compress_tokens(part, tokens, counted, project)


def _signal(signal: Signal, reading: Reading, number: int, first: int, patches: int, per_token: int) -> torch.Tensor:
    """A signal of one input; tokens of several patches have the mean of theirs."""
    values = reading.values[signal]
    if signal.kind == "cls":
        return values[number]
    own = values[first : first + patches]
    return own if per_token == 1 else own.unflatten(0, (-1, per_token)).mean(1)  # type: ignore[no-untyped-call]


def _seeds(images: Images, counts: list[int]) -> list[int]:
    """A number from the pixels of each input."""
    pixels: torch.Tensor = images if isinstance(images, torch.Tensor) else images["pixel_values"]
    if pixels.ndim == 2:  # packed
        parts = list(torch.split(pixels, counts))
    elif pixels.ndim == 3:  # padded patches
        parts = [row[:count] for row, count in zip(pixels, counts, strict=True)]
    else:
        parts = list(pixels)
    return [zlib.crc32(part.detach().float().cpu().contiguous().numpy().tobytes()) for part in parts]


__all__ = ["compress"]
