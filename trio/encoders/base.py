"""The interface of compressors: what the encoder side gives them, and what they give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from trio.origins import ImageTokens
from trio.part import Part

SignalKind = Literal["attention", "keys", "hidden", "cls", "groups"]
Space = Literal["tower", "language"]


@dataclass(frozen=True)
class Signal:
    """Something to read off a vision tower while it runs.

    Attributes:
        kind: what is read, for each patch:

            - ``attention``: float32 ``(n,)``, mean over heads of the class token's attention row; in towers without a
              class token the attention that the patch receives, mean over heads and queries.
            - ``keys``: float32 ``(n, heads, head_dim)``, as they enter the attention (before any rotation).
            - ``hidden``: ``(n, D)``, the output of a block.
            - ``cls``: ``(D,)``, the class token in the output of a block, once for each input of the tower.
            - ``groups``: int64 ``(n,)``, the first patch of the group that the patch was merged into, counted within
              its input. Reading it makes the tower merge in all blocks up to this one (`trio.encoders.inside`).
        layer: the block, counted from 0, or from the end where negative: -1 is the last. Attention and keys of a tower
            with windowed blocks are those of the next block that sees the whole picture.
        merges: for ``groups``, tokens merged in each block; None: what leaves the number that the reader is told.
        heads: ``one`` reads attention as though it had a single head of full width (LLaVA-PruMerge's released code).
    """

    kind: SignalKind
    layer: int
    heads: Literal["mean", "one"] = "mean"
    merges: int | None = None


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one input of the vision tower: a picture, a tile of one, or a frame of a video.

    n tokens now, s tokens at the start (before any compressor).

    Attributes:
        features: ``(n, D)``, in the space that the compressor asks for (`Compressor.space`).
        origins: of the n tokens; row and column may start anywhere (a tile's are those of the whole picture).
        sizes: float32 ``(n,)``, how many tokens of the start each one stands for.
        places: int64 ``(n,)``, for each token the one of the s at whose place it stands, all different; -1 for the
            class token, which has none. A token whose origin is a ``patch`` has the features that it started with.
        merged: int64 ``(s,)``, for each token of the start the one of the n that it went into, -1 where it was dropped.
        signals: what `Compressor.reads` asks for, first dimension n (but ``cls``: ``(D,)``).
        cls: ``(D,)``, the class token in the space of `features`; None where the tower has none, or nobody asked.
        seed: a number made from the prompt and the input's place in it (by `trio.encoders.compress`: from the pixels),
            the same in any batch.
    """

    features: torch.Tensor
    origins: ImageTokens
    sizes: torch.Tensor
    places: torch.Tensor
    merged: torch.Tensor
    signals: Mapping[Signal, torch.Tensor] = field(default_factory=dict)
    cls: torch.Tensor | None = None
    seed: int = 0

    @classmethod
    def start(
        cls,
        features: torch.Tensor,
        origins: ImageTokens,
        signals: Mapping[Signal, torch.Tensor] | None = None,
        *,
        class_token: torch.Tensor | None = None,
        seed: int = 0,
    ) -> VisualTokens:
        """Tokens of which none has been dropped or merged."""
        n, device = features.shape[0], features.device
        every = torch.arange(n, device=device)
        ones = torch.ones(n, dtype=torch.float32, device=device)
        return cls(features, origins, ones, every, every, dict(signals or {}), class_token, seed)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.features.shape[0])


class Compressor(Part, ABC):
    """Takes the visual tokens of a picture on the encoder side and gives fewer, by dropping or merging.

    A pipeline on a model whose tower cannot give what `reads` names is refused when it is built.
    """

    #: Where features are taken and merged: as they leave the tower, or as they enter the language model. Families whose
    #: projector mixes patches (Qwen, InternVL) have the second alone, and give it in both cases.
    space: ClassVar[Space] = "tower"
    #: True where the method decides the number itself; `compress` is then called with k = n.
    decides_count: ClassVar[bool] = False
    #: True where it draws from `VisualTokens.seed`, so that another prompt about the picture keeps other tokens.
    draws: ClassVar[bool] = False

    def reads(self) -> tuple[Signal, ...]:
        """What it reads off the tower."""
        return ()

    @property
    def wants_cls(self) -> bool:
        """Whether it may keep the class token as one of its k tokens."""
        return False

    @abstractmethod
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """Reduces to k tokens.

        Args:
            tokens: one input's tokens with the signals asked for.
            k: tokens to keep, between 1 and n.

        Returns:
            The tokens left, in raster order (the class token first), with sizes, places and merge map brought forward.
        """
