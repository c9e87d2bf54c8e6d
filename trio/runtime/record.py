"""What a prefill leaves behind, as tensors; reports are made from it when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .state import Counts, Images


@dataclass
class StageRecord:
    """One stage of one prefill. B samples, N the most visual tokens that a sample started with.

    Attributes:
        kept: bool ``(B, N)``, the tokens that are still there after the stage.
        entered: bool ``(B, N)``, the tokens that reached it.
        counts: tokens that each image has left.
        asked: the count asked for, for each group (image or sample) in order.
        saliency: float32 ``(B, N)``, nan where a token did not reach the stage; None unless asked to keep it.
        newlines: newline tokens that each sample has left; empty in families without.
    """

    kept: torch.Tensor
    entered: torch.Tensor
    counts: Counts
    asked: tuple[int, ...]
    saliency: torch.Tensor | None = None
    newlines: tuple[int, ...] = ()


@dataclass
class CompressedRecord:
    """What a compressor did in one prefill. B samples, N the most visual tokens that a sample started with.

    Attributes:
        name: of the compressor.
        kept: bool ``(B, N)``, where the tokens stand that it left.
        merge_map: int64 ``(B, N)``, for each token at the start the index of the one that it went into, -1 where it
            was dropped.
        counts: tokens that each image has left.
        asked: the number asked for each image, None where the method decided.
        newlines: newline tokens that each sample has left; empty in families without.
    """

    name: str
    kept: torch.Tensor
    merge_map: torch.Tensor
    counts: Counts
    asked: tuple[tuple[int | None, ...], ...]
    newlines: tuple[int, ...] = ()


@dataclass
class PrefillRecord:
    """One forward that brought visual tokens.

    Attributes:
        images: the images of each sample, with the visual tokens that they started with; where a compressor left a
            merged or a class token, its origin stands in their row.
        newlines: newline tokens that each sample started with; empty in families without.
        layer_lengths: for each decoder layer the padded length of the sequence.
        layer_tokens: for each decoder layer the valid tokens of each sample.
        stages: by index of the stage.
        valid: bool ``(B, S)`` on the CPU, the forward's own input without padding.
        seconds: time by phase, filled where the pipeline's report level is ``full``.
        cache_bytes: for each layer the bytes of keys and values that it holds after the prefill, and what it would hold
            with every token of the conversation; where the level is ``full``.
        compressed: what the compressor did; None without one, and where no image lost a token.
        replayed: whether the selection was given instead of computed.
    """

    images: Images
    valid: torch.Tensor
    newlines: tuple[int, ...] = ()
    layer_lengths: list[int] = field(default_factory=list)
    layer_tokens: list[tuple[int, ...]] = field(default_factory=list)
    stages: dict[int, StageRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cache_bytes: tuple[tuple[int, int], ...] | None = None
    compressed: CompressedRecord | None = None
    replayed: bool = False

    def fill_layers(self, num_layers: int, first: int) -> None:
        """Adds the layers that no hook saw: the `first` ones run on all tokens."""
        whole, length = tuple(self.valid.sum(1).tolist()), self.valid.shape[1]
        self.layer_lengths = [length] * first + self.layer_lengths
        self.layer_tokens = [whole] * first + self.layer_tokens
        assert len(self.layer_lengths) == num_layers, f"{len(self.layer_lengths)} of {num_layers} layers ran"
