"""What scorers and selectors see of the running forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from .probe import Probe, Rows, rows_at_end, rows_of_span
from .tokens import PATCH, ImageTokens
from .transfer import upload

ProbeName = Literal["next", "last", "ran"]


@dataclass(frozen=True)
class LayerContext:
    """Read-only view of the point between two decoder layers at which a stage stands.

    B samples, S columns of the sequence (padding included), D features, N the largest number of visual tokens that a
    sample still has.

    Attributes:
        hidden: ``(B, S, D)``, the hidden states that enter the next layer.
        visual: bool ``(B, S)``, True at visual tokens.
        valid: bool ``(B, S)``, False at padding.
        visual_index: int64 ``(B, N)``, the columns of the visual tokens in rising order (anything where not valid).
        visual_valid: bool ``(B, N)``.
        token_index: int64 ``(B, N)``, the index of each visual token among those that the sample started with.
        images: for each sample its images, with the tokens that they started with.
        counts: for each sample the visual tokens that each of its images still has.
        seeds: one 32-bit number for each sample, made from its prompt, the same in any batch.
        after_layer: decoder layers already run.
        num_layers: decoder layers of the model.
        tail: so many columns at the end are text behind all images in every sample, as far as the host knows.
    """

    hidden: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    visual_index: torch.Tensor
    visual_valid: torch.Tensor
    token_index: torch.Tensor
    images: tuple[tuple[ImageTokens, ...], ...]
    counts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    after_layer: int
    num_layers: int
    probes: Mapping[ProbeName, Callable[[], Probe]] = field(default_factory=dict, repr=False)
    tail: int = 0

    def probe(self, which: ProbeName = "next") -> Probe:
        """The view into a decoder layer.

        ``"next"``: the layer about to run, on the hidden states that enter it. ``"last"``: the layer that has just
        run, applied once more to those hidden states. ``"ran"``: the layer that has just run, on its own inputs.
        """
        return self.probes[which]()

    def after_images(self) -> torch.Tensor:
        """Where the text behind a sample's last visual token stands: bool ``(B, S)``; all its tokens if there is none.

        That is the question where images come first, and what the chat template puts behind it.
        """
        ahead = self.visual.flip(1).cumsum(1).flip(1)  # visual tokens at a column and behind it
        text = self.valid & (ahead == 0)
        return torch.where(text.any(1, keepdim=True), text, self.valid)

    def last_rows(self, count: int, *, skip: int = 0, behind_images: bool = False) -> Rows:
        """The last rows of each sample, see `rows_at_end`; found without the device where all end in enough text.

        Args:
            count: rows for each sample, at least 1.
            skip: how many of the last rows to leave out.
            behind_images: only those of `after_images`.
        """
        if count + skip <= self.tail:
            end = self.valid.shape[1] - skip
            return rows_of_span(self.valid, slice(end - count, end))
        return rows_at_end(self.after_images() if behind_images else self.valid, count, skip=skip)

    def at_visual(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(B, S)`` at the visual tokens: float32 ``(B, N)``, -inf where a sample has fewer."""
        picked = values.float().to(self.visual_index.device).gather(1, self.visual_index)
        if all(sum(counts) == picked.shape[1] for counts in self.counts):
            return picked
        return picked.masked_fill(~self.visual_valid, float("-inf"))


@dataclass(frozen=True)
class TokenOrigins:
    """Where visual tokens come from, as tensors; what stands at padding means nothing.

    G groups, N tokens. Frames of a video, and an image and its tiles, are one image.

    Attributes:
        row: float32 ``(G, N)``, the middle of the token as a share of the image's height, 0 at the top; nan where that
            is not known (a class token, tiles whose arrangement is not told, models of the generic adapter alone).
        column: float32 ``(G, N)``, likewise as a share of the image's width, 0 at the left.
        image: int64 ``(G, N)``, the number of the image among those of the sample.
        frame: int64 ``(G, N)``, the frame of a video; of a tiled image 0 is the whole image and 1 the tiles.
        kind: int64 ``(G, N)``, index into `trio.core.tokens.KINDS`.
        tiles: computes `tile`; None where the tiles are not known.
    """

    row: torch.Tensor
    column: torch.Tensor
    image: torch.Tensor
    frame: torch.Tensor
    kind: torch.Tensor
    # A factory, so that the class has no value that would hide a `DeferredOrigins`' own.
    tiles: Callable[[], torch.Tensor] | None = field(default_factory=lambda: None, repr=False)

    @property
    def tile(self) -> torch.Tensor:
        """float32 ``(G, N)``, the input of the vision tower (a tile or a frame) that each token comes from, from 0.

        Counted within the image; nan where that is not known. Computed when it is asked for.
        """
        return torch.full_like(self.row, float("nan")) if self.tiles is None else self.tiles()

    @property
    def grid_positions(self) -> torch.Tensor:
        """float32 ``(G, N, 2)``: row and column."""
        return torch.stack([self.row, self.column], -1)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenOrigins:
        """The origins with a function applied to each tensor, to `tile` when it is asked for."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tiles"}
        tiles = self.tiles
        return TokenOrigins(
            **{name: function(tensor) for name, tensor in tensors.items()},
            tiles=None if tiles is None else lambda: function(tiles()),
        )

    @classmethod
    def unknown(cls, like: torch.Tensor) -> TokenOrigins:
        """Patches of one image, at positions that are not known, in the shape of `like`."""
        nan = torch.full_like(like, float("nan"), dtype=torch.float32)
        zero = torch.zeros_like(like, dtype=torch.int64)
        return cls(nan, nan, zero, zero, zero + PATCH)


class DeferredOrigins(TokenOrigins):
    """Origins that are computed when somebody reads one of them: most selectors read none."""

    def __init__(self, compute: Callable[[], TokenOrigins]) -> None:
        """Origins that `compute` gives, once."""
        vars(self)["_compute"] = compute

    def __getattr__(self, name: str) -> Any:
        """A field of the computed origins, which then are this object's own."""
        if name == "_compute" or name.startswith("__"):
            raise AttributeError(name)
        computed: TokenOrigins = self._compute()
        vars(self).update(vars(computed))
        return vars(self)[name]


@dataclass(frozen=True)
class SelectionContext:
    """What a selector sees: a batch of groups of visual tokens.

    A group is an image, or all images of a sample: whatever a stage's `keep` counts for. G groups, N tokens of the
    largest one, D features. Read only. Further fields may come; `start` fills in what is not given.

    Attributes:
        saliency: float32 ``(G, N)``, higher means keep; -inf where not valid.
        features: ``(G, N, D)``, the hidden states at the stage, in the model's dtype.
        k: int64 ``(G,)`` on the CPU, between 0 and the number of valid tokens of the group.
        valid: bool ``(G, N)``, False at padding, which comes last.
        counts: valid tokens of each group (known on the host).
        origins: where the tokens come from.
        sizes: float32 ``(G, N)``, how many visual tokens each one stands for: more than 1 where a compressor merged.
        seeds: one 32-bit number for each group, made from its prompt and its image, the same in any batch.
    """

    saliency: torch.Tensor
    features: torch.Tensor
    k: torch.Tensor
    valid: torch.Tensor
    counts: tuple[int, ...]
    origins: TokenOrigins
    sizes: torch.Tensor
    seeds: tuple[int, ...]

    @classmethod
    def start(
        cls,
        saliency: torch.Tensor,
        features: torch.Tensor,
        k: torch.Tensor,
        valid: torch.Tensor | None = None,
        *,
        origins: TokenOrigins | None = None,
        sizes: torch.Tensor | None = None,
        seeds: tuple[int, ...] | None = None,
    ) -> SelectionContext:
        """A context of what is known: all tokens are valid, at unknown positions, of size 1, unless given."""
        valid = torch.ones_like(saliency, dtype=torch.bool) if valid is None else valid
        return cls(
            saliency=saliency,
            features=features,
            k=k,
            valid=valid,
            counts=tuple(valid.sum(1).tolist()),
            origins=TokenOrigins.unknown(saliency) if origins is None else origins,
            sizes=torch.ones_like(saliency, dtype=torch.float32) if sizes is None else sizes,
            seeds=(0,) * len(valid) if seeds is None else seeds,
        )

    def generator(self, group: int) -> torch.Generator:
        """A new generator on the CPU for one group: the same numbers for the group in any batch, and again."""
        return torch.Generator().manual_seed(self.seeds[group])

    def random(self) -> torch.Tensor:
        """Uniform numbers, float32 ``(G, N)``, for each group from its own generator; 0 at padding."""
        draws = torch.zeros(self.valid.shape)
        for group, count in enumerate(self.counts):
            draws[group, :count] = torch.rand(count, generator=self.generator(group))
        return upload(draws, self.valid.device)
