"""The model's part: features of images as vLLM's own tower gives them, compressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...core.tokens import ImageTokens, Signal, VisualTokens, seats
from ...encoders.features import compress_tokens
from ...errors import InputError
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
        signals: what the compressor reads, of the n tokens.
        class_tokens: ``(inputs, D)``, of each input of the tower; None where nobody asked.
        later: ``(n, E)``, further features of the n tokens that travel with them, such as DeepStack's.
        in_prompt: the tokens in the prompt, newlines included; None where that is `image`.
    """

    spec: EngineSpec
    image: ImageTokens
    pieces: list[torch.Tensor]
    features: torch.Tensor
    pixels: Sequence[torch.Tensor]
    signals: Mapping[Signal, torch.Tensor] = field(default_factory=dict)
    class_tokens: torch.Tensor | None = None
    later: torch.Tensor | None = None
    in_prompt: ImageTokens | None = None


@dataclass(frozen=True)
class CompressedItem:
    """What is left of an image.

    Attributes:
        features: ``(m, D')``, projected, in the order of the image's tokens; the further features behind them.
        indices: int64 ``(m,)`` on the CPU or the device, the place of each among the n tokens.
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
        asked: list[int] = []
        counts: list[int] = []
        for at in members:
            item = items[at]
            sizes = [len(piece) for piece in item.pieces]
            asked += item.spec.counts(sizes)
            counts += sizes if compressor.decides_count else asked[-len(sizes) :]
            for number, piece in enumerate(item.pieces):
                seed = pixel_seed(item.pixels[number]) if compressor.draws else 0
                own = piece.to(item.features.device)
                tokens.append(
                    VisualTokens.start(
                        item.features[own],
                        item.image.select(piece),
                        {signal: values[own] for signal, values in item.signals.items()},
                        class_token=_class_token(item, number),
                        seed=seed,
                    )
                )
        compressed = compress_tokens(compressor, tokens, counts, project)
        found = [one.tokens for one in compressed]
        if found != asked:
            raise InputError(f"compressor: it left {found} tokens where the prompt has room for {asked}; report it")
        left = iter(compressed)
        for at in members:
            done[at] = _joined(items[at], [next(left) for _ in items[at].pieces])
    return [done[at] for at in range(len(items))]


def _class_token(item: EncodedItem, number: int) -> torch.Tensor | None:
    """The class token of an input of the tower, for compressors that keep it."""
    if item.class_tokens is None or not item.spec.compressor.wants_cls:
        return None
    return item.class_tokens[number]


def _joined(item: EncodedItem, parts: Sequence[VisualTokens]) -> CompressedItem:
    """The pieces of an image in one row, in the order of its tokens."""
    device = item.features.device
    indices = torch.cat(
        [
            piece.to(device)[seats(part.token_index, part.origins.kind, len(piece))]
            for piece, part in zip(item.pieces, parts, strict=True)
        ]
    )
    features = torch.cat([part.features for part in parts])
    if item.later is not None:
        later = [_merged(item.later[piece.to(device)], part) for piece, part in zip(item.pieces, parts, strict=True)]
        features = torch.cat([features, torch.cat(later)], 1)
    if len(parts) > 1:
        order = indices.argsort()
        indices, features = indices[order], features[order]
    return CompressedItem(features, indices, len(indices) == item.image.tokens)


def _merged(later: torch.Tensor, left: VisualTokens) -> torch.Tensor:
    """Further features ``(n, E)``, the mean over the tokens that went into each of the m that are left: ``(m, E)``."""
    own, into = later[left.token_index], left.merge_map
    total = own.new_zeros(len(own) + 1, own.shape[1], dtype=torch.float32)
    index = torch.where(into < 0, len(own), into)
    total.index_add_(0, index, later.float())
    count = torch.bincount(index, minlength=len(own) + 1)[:-1, None]
    return torch.where(count > 1, (total[:-1] / count.clamp_min(1)).to(own.dtype), own)


def pixel_seed(pixels: torch.Tensor) -> int:
    """A number from the pixels of an input of the tower, as `trio.encoders.compress` makes it."""
    return zlib.crc32(pixels.detach().float().cpu().contiguous().numpy().tobytes())
