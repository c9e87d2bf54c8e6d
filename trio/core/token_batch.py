"""The visual tokens of many inputs of the vision tower side by side: a compressor works on all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .tokens import ImageTokens, Signal, VisualTokens
from .transfer import upload

#: What a batch may take at work: 50 tiles of LLaVA-NeXT in the language model's width, 4 images of 4,096 tokens.
BATCH_BYTES = 2**30


@dataclass(frozen=True)
class TokenBatch:
    """The visual tokens of G inputs, padded at the end to the N tokens of the longest; see `VisualTokens`.

    What stands at padding means nothing, and must have no influence on what is kept.

    Attributes:
        features: ``(G, N, D)``.
        counts: tokens of each input.
        origins: of each input.
        sizes: float32 ``(G, N)``.
        token_index: int64 ``(G, N)``.
        merge_map: int64 ``(G, S)``, S the most tokens that an input started with.
        starts: tokens that each input started with.
        signals: first dimensions ``(G, N)`` (but ``cls``: ``(G, D)``).
        cls: ``(G, D)`` or None.
        seeds: of each input.
        host_index: `token_index` on the CPU, where the host knows it without asking the device.
        host_map: `merge_map` likewise.
        whole: whether no token is known to have been dropped or merged, so that indices and map are 0, 1, 2, ...
    """

    features: torch.Tensor
    counts: tuple[int, ...]
    origins: tuple[ImageTokens, ...]
    sizes: torch.Tensor
    token_index: torch.Tensor
    merge_map: torch.Tensor
    starts: tuple[int, ...]
    signals: Mapping[Signal, torch.Tensor] = field(default_factory=dict)
    cls: torch.Tensor | None = None
    seeds: tuple[int, ...] = ()
    host_index: torch.Tensor | None = None
    host_map: torch.Tensor | None = None
    whole: bool = False

    @classmethod
    def start(
        cls,
        features: torch.Tensor,
        origins: Sequence[ImageTokens],
        signals: Mapping[Signal, torch.Tensor],
        *,
        class_tokens: torch.Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> TokenBatch:
        """Tokens of which none has been dropped or merged; the arguments are those of the attributes."""
        counts = tuple(one.tokens for one in origins)
        shape, device = features.shape[:2], features.device
        every = torch.arange(shape[1], device=device).expand(shape)
        ones = torch.ones(shape, dtype=torch.float32, device=device)
        seeds = (0,) * len(counts) if seeds is None else tuple(seeds)
        host = torch.arange(shape[1]).expand(shape)
        return cls(
            features,
            counts,
            tuple(origins),
            ones,
            every,
            every,
            counts,
            dict(signals),
            class_tokens,
            seeds,
            host,
            host,
            whole=True,
        )

    @classmethod
    def stack(cls, tokens: Sequence[VisualTokens]) -> TokenBatch:
        """Inputs side by side, at least one; all with the same signals, and all or none with a class token."""
        signals = {
            one: _stacked([each.signals[one] for each in tokens], padded=one.kind != "cls") for one in tokens[0].signals
        }
        class_tokens = [each.cls for each in tokens if each.cls is not None]
        return cls(
            _stacked([each.features for each in tokens]),
            tuple(each.tokens for each in tokens),
            tuple(each.origins for each in tokens),
            _stacked([each.sizes for each in tokens]),
            _stacked([each.token_index for each in tokens]),
            _stacked([each.merge_map for each in tokens]),
            tuple(len(each.merge_map) for each in tokens),
            signals,
            _stacked(class_tokens) if len(class_tokens) == len(tokens) else None,
            tuple(each.seed for each in tokens),
        )

    def unstack(self) -> list[VisualTokens]:
        """Each input alone; its tensors are views."""
        return [self._alone(g) for g in range(len(self.counts))]

    def _alone(self, g: int) -> VisualTokens:
        count = self.counts[g]
        return VisualTokens(
            self.features[g, :count],
            self.origins[g],
            self.sizes[g, :count],
            self.token_index[g, :count],
            self.merge_map[g, : self.starts[g]],
            LazySignals(self.signals, lambda one, value: value[g] if one.kind == "cls" else value[g, :count]),
            None if self.cls is None else self.cls[g],
            self.seeds[g],
        )

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool ``(G, N)``, True where a token is."""
        return first(self.counts, self.features.shape[1], self.features.device)

    @property
    def present(self) -> torch.Tensor | None:
        """`valid`; None where nothing is padding."""
        return self.valid if any(count < self.features.shape[1] for count in self.counts) else None


def batches(counts: Sequence[int], width: int) -> list[list[int]]:
    """Which inputs go into a batch together: all of them, but for what memory allows.

    A batch takes about `BATCH_BYTES`, and inputs of less than half the tokens of its longest one have no place in it
    where padding them would cost much.

    Args:
        counts: tokens of each input.
        width: of the features.

    Returns:
        For each batch its inputs, the longest first.
    """
    packed: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(counts)), key=lambda at: -counts[at]):
        if packed:
            # Features at length 1 and what is similar to what, both in float32, and once more for what is made of them.
            size = (len(packed[-1]) + 1) * longest * (width + longest) * 8
            if size <= BATCH_BYTES // 8 or (size <= BATCH_BYTES and 2 * counts[at] >= longest):
                packed[-1].append(at)
                continue
        packed.append([at])
        longest = counts[at]
    return packed


class LazySignals(Mapping[Signal, torch.Tensor]):
    """Signals that are brought forward when somebody reads them, once."""

    def __init__(
        self, signals: Mapping[Signal, torch.Tensor], forward: Callable[[Signal, torch.Tensor], torch.Tensor]
    ) -> None:
        """Binds what makes each signal of the signals before."""
        self._signals, self._forward = signals, forward
        self._made: dict[Signal, torch.Tensor] = {}

    def __getitem__(self, signal: Signal) -> torch.Tensor:
        if signal not in self._made:
            self._made[signal] = self._forward(signal, self._signals[signal])
        return self._made[signal]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._signals)

    def __len__(self) -> int:
        return len(self._signals)


def first(counts: Sequence[int], most: int, device: torch.device) -> torch.Tensor:
    """bool ``(G, most)``, True at the first ``counts[g]`` of each row."""
    if all(count >= most for count in counts):
        return torch.ones(len(counts), most, dtype=torch.bool, device=device)
    return torch.arange(most, device=device) < upload(counts, device)[:, None]


def _stacked(rows: Sequence[torch.Tensor], padded: bool = True) -> torch.Tensor:
    """``(G, n, ...)`` of G tensors ``(n, ...)``, padded with zeros at the end."""
    if len(rows) == 1:
        return rows[0][None]
    if padded and len({len(row) for row in rows}) > 1:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return torch.stack(list(rows))
