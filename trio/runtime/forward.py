"""What the runtime knows of the forward that is running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.context import TokenOrigins
from ..core.probe import LayerInputs
from ..core.transfer import HostValues, upload
from .record import PrefillRecord
from .state import Counts, TokenState, drop, origins_of

if TYPE_CHECKING:
    from .stage import BoundStage


@dataclass
class Prefill:
    """The running forward of new visual tokens.

    Attributes:
        record: what will be reported.
        state: the tokens still there.
        host: the same on the CPU, as long as all reductions were chosen there; None where the state is there itself.
        input_ids: int64 ``(B, S)`` on the CPU.
        seeds: one number for each sample.
        modalities: for each image what encoded it.
        encoded: by modality, the arguments of the encoding that this forward uses.
        num_layers: decoder layers of the model.
        forced: for each stage the tokens to keep, bool ``(B, N)`` of the tokens at the start, in place of scoring.
        score_only: score, but drop nothing.
        keep_saliency: keep the saliencies in the record, and score even where nothing can be dropped.
        clock: whether to measure phases.
        finite: for each scored stage the lowest and the highest saliency, on the device: nan where any is.
        find_tiles: gives float32 ``(B, N)``, see `TokenOrigins.tile`, for the tokens at the start.
        embeddings: where the forward keeps no cache, those of its visual tokens, ``(n, D)``.
        repeats: whether the forward is a further step of generation without a cache.
    """

    record: PrefillRecord
    state: TokenState
    input_ids: torch.Tensor
    seeds: tuple[int, ...]
    num_layers: int
    host: TokenState | None = None
    modalities: tuple[tuple[str, ...], ...] = ()
    encoded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    forced: Mapping[int, torch.Tensor] | None = None
    score_only: bool = False
    keep_saliency: bool = False
    clock: bool = False
    finite: list[tuple[BoundStage, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)
    find_tiles: Callable[[], torch.Tensor] | None = None
    embeddings: torch.Tensor | None = None
    repeats: bool = False
    _origins: TokenOrigins | None = field(default=None, init=False, repr=False)

    def origins_on(self, device: torch.device) -> TokenOrigins:
        """Where the tokens at the start come from, behind the compressor: ``(B, N)``, the same at every stage."""
        if self._origins is None:
            self._origins = replace(origins_of(self.record.images), tiles=self.find_tiles)
        if self._origins.row.device != device:
            self._origins = self._origins.map(lambda values: upload(values, device))
        return self._origins

    @cached_property
    def sizes(self) -> torch.Tensor | None:
        """How many tokens at the start each one stands for: float32 ``(B, N)``; None where each is one of them."""
        compressed = self.record.compressed
        if compressed is None:
            return None
        merge_map = upload(compressed.merge_map, self.state.valid.device)
        sizes = torch.zeros(merge_map.shape, device=merge_map.device)
        return sizes.scatter_add_(1, merge_map.clamp_min(0), (merge_map >= 0).float())

    @cached_property
    def one(self) -> torch.Tensor:
        """The number 1 on the device, float32."""
        return torch.ones((), device=self.state.valid.device)

    def known(self, keep: torch.Tensor) -> TokenState:
        """The tokens still there, on the device of a mask over them."""
        return self.host if self.host is not None and keep.device.type == "cpu" else self.state

    def drop(self, keep: torch.Tensor, counts: Counts) -> torch.Tensor:
        """Drops visual tokens: on the host where they were chosen there and all is known, else on the device.

        Args:
            keep: bool ``(B, N)``, visual tokens to keep, on the device or on the CPU.
            counts: tokens that each image has left.

        Returns:
            int64 ``(B, S')`` on the device, the present columns that remain (padding points at anything).
        """
        before, device = self.state, self.state.valid.device
        known = self.known(keep)
        state, columns = drop(known, upload(keep, known.valid.device), counts)
        self.host = state if known is self.host else None
        self.state = state.to(device, before)
        return upload(columns, device)

    @property
    def shorter(self) -> bool:
        """Whether some token has been dropped."""
        started = tuple(tuple(image.tokens for image in sample) for sample in self.record.images)
        return self.state.counts != started

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Adds the time of the block to a phase; does nothing without a clock."""
        if not self.clock:
            yield
            return
        begin = now(device)
        yield
        seconds = self.record.seconds
        seconds[phase] = seconds.get(phase, 0.0) + now(device) - begin

    def continues(self, earlier: Prefill) -> bool:
        """Whether this is the next step of generation without a cache, which repeats the prompt one token longer.

        Beams may have changed places, but their prompts have not.
        """
        ids, before = self.input_ids, earlier.input_ids
        if self.embeddings is None or earlier.embeddings is None or self.embeddings.shape != earlier.embeddings.shape:
            return False
        if ids.shape != (before.shape[0], before.shape[1] + 1):
            return False
        prompts = {tuple(row) for row in before.tolist()}
        return all(tuple(row) in prompts for row in ids[:, :-1].tolist()) and torch.allclose(
            self.embeddings, earlier.embeddings, rtol=1e-3, atol=1e-5
        )

    def repeat(self, earlier: Prefill) -> None:
        """Keeps what an earlier step kept, and draws what it drew."""
        self.forced = {index: stage.kept for index, stage in earlier.record.stages.items()}
        self.seeds = earlier.seeds
        self.repeats = True


def now(device: torch.device) -> float:
    """The clock in seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Segment:
    """What all layers between two reductions share in a forward, and what their caches are told to expect.

    Attributes:
        keys: that the caches of these layers hold after the forward, ``past + S``.
        valid: bool ``(B, n)`` for the first n of these keys, False at padding; None where no key is padding.
        dropped: int64 ``(B,)``, tokens dropped so far, earlier turns included; None where none was.
        mask: the attention mask in the backend's form.
        rotary: the rotary embeddings of the tokens that are there.
        tokens: of the conversation that the forward brings, the dropped ones included.
        reduced: whether it drops tokens in front of these layers.
        mask_ahead: a mask of one query whose first columns serve the next steps too; None where there is none.
    """

    keys: int
    valid: torch.Tensor | None
    dropped: torch.Tensor | None
    mask: Any
    rotary: Any
    tokens: int
    reduced: bool
    mask_ahead: torch.Tensor | None = None


@dataclass
class Forward:
    """One running forward of the model.

    Attributes:
        entry: the module through which it came in; the forward ends with it.
        call: arguments of the multimodal module, by name.
        brings_images: whether the call brings images.
        reached: whether the language model was called.
        modalities: what was encoded within this forward.
        features: visual features to be added in front of a layer, ``(B, N, D)``.
        begin: when the language model started, in seconds.
        mask: of the whole conversation, bool or int ``(B, past + S)``, or None.
        appended: whether `generate` added the tokens behind its own last forward, so that none is padding.
        positions: as the language model got them, or None.
        position_rows: rows of position ids that the language model was given side by side, see
            `Shrinker.stack_positions`; 0 where it has those of its caller.
        asks_cache: whether keys and values are to be kept, so that every layer must meet a cache.
        cache: the cache of this forward, as soon as it was seen.
        past: tokens of the conversation in that cache before this forward.
        brought: tokens of the conversation that this forward brings, the dropped ones included.
        visited: calls of decoder layers from the first reduction on.
        prefill: the stages' state, where the forward brings visual tokens.
        active: whether decoder layers need anything of the runtime.
        segments: by number of stages passed and sliding window of the layer.
        ran: what entered the last layer, where a scorer wants it.
        looked: ids, mask and sizes of images, as far as the host has looked at them.
    """

    entry: nn.Module
    call: Mapping[str, Any] = field(default_factory=dict)
    brings_images: bool = False
    reached: bool = False
    modalities: set[str] = field(default_factory=set)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    begin: float = 0.0
    mask: torch.Tensor | None = None
    appended: bool = False
    positions: torch.Tensor | None = None
    position_rows: int = 0
    asks_cache: bool = False
    cache: Any = None
    past: int = 0
    brought: int = 0
    visited: int = 0
    prefill: Prefill | None = None
    active: bool = False
    segments: dict[tuple[int, int | None], Segment] = field(default_factory=dict)
    ran: LayerInputs | None = None
    looked: HostValues | None = None

    def tokens(self, hidden: torch.Tensor) -> int:
        """Tokens of the conversation that this forward brings, the dropped ones included."""
        return hidden.shape[1] if self.prefill is None else self.prefill.record.valid.shape[1]
