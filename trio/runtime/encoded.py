"""Joins the images of the prompts to what the vision tower encoded: which patches each visual token stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.backbone import Backbone
from ..core.patches import PatchMap
from ..core.tokens import ImageTokens
from ..errors import InputError, UnsupportedModelError
from .state import Images


@dataclass(frozen=True)
class EncodedImage:
    """An image of a prompt, and its part of an encoding.

    Attributes:
        image: its tokens, without newlines.
        modality: of the encoder method; None where its call is not known.
        number: place among the images of that call.
        offset: patches of the call in front of the image's own.
        patches: None where the adapter does not know them.
    """

    image: ImageTokens
    modality: str | None = None
    number: int = 0
    offset: int = 0
    patches: PatchMap | None = None

    def pieces(self) -> list[torch.Tensor]:
        """Its tokens by input of the tower, int64 on the CPU."""
        if self.patches is None:
            return [torch.arange(self.image.tokens)]
        tiles = self.patches.tile
        return [(tiles == tile).nonzero().squeeze(1) for tile in sorted(set(tiles.tolist()))]


def match_images(
    backbone: Backbone,
    images: Images,
    modalities: tuple[tuple[str, ...], ...],
    encoded: Mapping[str, Mapping[str, Any]],
) -> tuple[list[list[EncodedImage]], dict[str, int]]:
    """Finds every image of the prompts in the encodings that the forward uses.

    Args:
        backbone: the model, through its adapter.
        images: of each sample, at the start of the forward.
        modalities: of each image.
        encoded: arguments of the encoder calls, by modality.

    Returns:
        For each sample its images, and by modality the patches that its images have together.

    Raises:
        InputError: the prompts hold other images than were encoded.
    """
    matched = [[EncodedImage(image) for image in row] for row in images]
    totals: dict[str, int] = {}
    for modality, arguments in encoded.items():
        members = [[number for number, own in enumerate(row) if own == modality] for row in modalities]
        held = [images[sample][number] for sample, row in enumerate(members) for number in row]
        if not held:
            continue
        given = backbone.encoded_images(held, arguments)
        repeats, rest = divmod(len(held), given) if given else (0, 1)
        if rest or not repeats or len(images) % repeats:
            raise InputError(
                f"compressor: the prompts hold {len(held)} images, the last encoding brought {given}: the "
                "features were computed for other prompts, or while the pipeline was not attached; pass pixels"
            )
        number = offset = 0
        for group in range(0, len(images), repeats):  # beams and the like repeat every sample
            for position, first in enumerate(members[group]):
                patches = backbone.patch_map(images[group][first], number, arguments)
                for sample in range(group, group + repeats):
                    own = members[sample][position]
                    matched[sample][own] = EncodedImage(images[sample][own], modality, number, offset, patches)
                number, offset = number + 1, offset + (0 if patches is None else patches.total)
        totals[modality] = offset
    return matched, totals


def tiles_of(
    backbone: Backbone,
    images: Images,
    modalities: tuple[tuple[str, ...], ...],
    encoded: Mapping[str, Mapping[str, Any]],
) -> torch.Tensor:
    """The tower's input that each token at the start comes from: float32 ``(B, N)`` on the CPU, nan where not known.

    See `match_images`; what cannot be matched is not known.
    """
    try:
        matched, _ = match_images(backbone, images, modalities, encoded)
    except (InputError, UnsupportedModelError):
        matched = [[EncodedImage(image) for image in row] for row in images]
    rows = [
        torch.cat(
            [
                torch.full((one.image.tokens,), float("nan")) if one.patches is None else one.patches.tile.float()
                for one in row
            ]
            or [torch.zeros(0)]
        )
        for row in matched
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
