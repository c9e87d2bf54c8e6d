"""The model's part: features of images as vLLM's own tower gives them, compressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...core.tokens import ImageTokens, VisualTokens
from ...encoders.features import compress_tokens
from .settings import EngineSpec


@dataclass(frozen=True)
class EncodedItem:
    """An image on its way from the tower into the prompt.

    Attributes:
        spec: of its request.
        image: its n tokens, without newlines.
        pieces: int64, the tokens of each input of the tower, among the n.
        features: ``(n, D)``, not yet projected.
        pixels: of each input of the tower.
    """

    spec: EngineSpec
    image: ImageTokens
    pieces: list[torch.Tensor]
    features: torch.Tensor
    pixels: Sequence[torch.Tensor]


@dataclass(frozen=True)
class CompressedItem:
    """What is left of an image.

    Attributes:
        features: ``(m, D')``, projected, in the order of the image's tokens.
        indices: int64 ``(m,)`` on the CPU or the device, which of the n tokens each stands in for.
        whole: whether no token is gone.
    """

    features: torch.Tensor
    indices: torch.Tensor
    whole: bool


def compress_items(
    items: Sequence[EncodedItem], project: Callable[[torch.Tensor], torch.Tensor] | None
) -> list[CompressedItem]:
    """Compresses images, together where they have one spec.

    Args:
        items: the images.
        project: the projector; None where features are projected already.
    """
    by_spec: dict[str, list[int]] = {}
    for at, item in enumerate(items):
        by_spec.setdefault(item.spec.text, []).append(at)
    done: dict[int, CompressedItem] = {}
    for members in by_spec.values():
        compressor = items[members[0]].spec.compressor
        tokens: list[VisualTokens] = []
        counts: list[int] = []
        for at in members:
            item = items[at]
            counts += item.spec.counts([len(piece) for piece in item.pieces])
            for number, piece in enumerate(item.pieces):
                seed = pixel_seed(item.pixels[number]) if compressor.draws else 0
                rows = item.features[piece.to(item.features.device)]
                tokens.append(VisualTokens.start(rows, item.image.select(piece), seed=seed))
        left = iter(compress_tokens(compressor, tokens, counts, project))
        for at in members:
            done[at] = _joined(items[at], [next(left) for _ in items[at].pieces])
    return [done[at] for at in range(len(items))]


def _joined(item: EncodedItem, parts: Sequence[VisualTokens]) -> CompressedItem:
    """The pieces of an image in one row, in the order of its tokens."""
    device = item.features.device
    indices = torch.cat([piece.to(device)[part.token_index] for piece, part in zip(item.pieces, parts, strict=True)])
    features = torch.cat([part.features for part in parts])
    if len(parts) > 1:
        order = indices.argsort()
        indices, features = indices[order], features[order]
    return CompressedItem(features, indices, len(indices) == item.image.tokens)


def pixel_seed(pixels: torch.Tensor) -> int:
    """A number from the pixels of an input of the tower, as `trio.encoders.compress` makes it."""
    return zlib.crc32(pixels.detach().float().cpu().contiguous().numpy().tobytes())
