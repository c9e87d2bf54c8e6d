"""What a prefill leaves behind, as tensors; reports are made from it when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .state import Counts, Images


@dataclass
class StageRecord:
    """One stage of one prefill. B samples, N the most visual tokens that a sample started with.

    Attributes:
        keep: bool ``(B, n)``, which of the n visual tokens that reached the stage are still there after it.
        reached: bool ``(B, n)``, False at padding.
        token_index: int64 ``(B, n)``, the index of each among those that the sample started with.
        most_at_start: N.
        counts: tokens that each image has left.
        asked: the count asked for, for each group (image or sample) in order.
        scores: ``(B, n)``, their saliencies; None unless asked to keep them.
        newlines: newline tokens that each sample has left; empty in families without.
    """

    keep: torch.Tensor
    reached: torch.Tensor
    token_index: torch.Tensor
    most_at_start: int
    counts: Counts
    asked: tuple[int, ...]
    scores: torch.Tensor | None = None
    newlines: tuple[int, ...] = ()

    # What reports read is put in order when somebody reads it: a stage has no need of it.

    @property
    def kept(self) -> torch.Tensor:
        """bool ``(B, N)``, the tokens that are still there after the stage."""
        return self._at_start(self.keep, False)

    @property
    def entered(self) -> torch.Tensor:
        """bool ``(B, N)``, the tokens that reached it."""
        return self._at_start(self.reached, False)

    @property
    def saliency(self) -> torch.Tensor | None:
        """float32 ``(B, N)``, nan where a token did not reach the stage; None unless it was asked to be kept."""
        return None if self.scores is None else self._at_start(self.scores.float(), float("nan"))

    def on_host(self) -> StageRecord:
        """The same on the CPU."""
        return replace(
            self,
            keep=self.keep.cpu(),
            reached=self.reached.cpu(),
            token_index=self.token_index.cpu(),
            scores=None if self.scores is None else self.scores.cpu(),
        )

    def _at_start(self, values: torch.Tensor, absent: bool | float) -> torch.Tensor:
        """Values of the tokens that reached the stage as values of those at the start."""
        batch, most = values.shape[0], self.most_at_start
        out = torch.full((batch, most + 1), absent, dtype=values.dtype, device=self.reached.device)
        out.scatter_(1, torch.where(self.reached, self.token_index, most), values.to(out.device))
        return out[:, :most]


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
