"""Vision towers as vLLM builds them: what readers must know, as `trio.encoders.towers` has it of other libraries.

Queries and keys are taken where they enter vLLM's attention module, whatever stands in front of it: one projection for
queries, keys and values, split over the processes of tensor parallelism or not, and rotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.tokens import Signal
from ...encoders.reading.reader import Reader
from ...encoders.towers.base import Heads, Held, Peers, Tower, split_heads
from ...encoders.towers.clip import ClipTower
from ...encoders.towers.qwen_vl import QwenTower
from .settings import EngineSpec, ServedTower

T = TypeVar("T")
_NO_MERGING = "the engine's attention takes no bias"


def _arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The first arguments of a call, given by place or by name."""
    return [args[at] if at < len(args) else kwargs[name] for at, name in enumerate(names)]


class ServedClipTower(ClipTower):
    """vLLM's ``CLIPVisionModel``, which lacks the blocks behind the one whose features are used."""

    blocks_path = "vision_model.encoder.layers"
    attention_path = "self_attn.attn"
    merging_reason = _NO_MERGING

    def __init__(self, module: nn.Module, peers: Peers | None = None) -> None:
        """Binds the tower; `peers` hold the other heads."""
        super().__init__(module)
        self._peers = peers

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`: the module that gets queries, keys and values."""
        return self.part(block, self.attention_path)

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        attention: Any = self.attention(block)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            queries, keys = (split_heads(one, attention.num_heads) for one in _arguments(_INTO, args, kwargs))
            told(Heads(queries, keys, keys, attention.scale, self._peers))

        return [attention.register_forward_pre_hook(before, with_kwargs=True)]


class ServedQwenTower(QwenTower):
    """vLLM's towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

    merging_reason = _NO_MERGING

    def __init__(self, module: nn.Module, peers: Peers | None = None) -> None:
        """Binds the tower; `peers` hold the other heads."""
        super().__init__(module)
        self._peers = peers

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`: the module that gets queries, keys and values."""
        self.part(block, "attn.apply_rotary_emb")
        return self.part(block, "attn.attn")

    def patch_order(self, grid: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """See `QwenTower.patch_order`: the windows are vLLM's own."""
        module: Any = self.module
        if not hasattr(module, "get_window_index_thw"):
            return None
        index, first = [], 0
        for frames, rows, columns in grid.tolist():
            index.append(module.get_window_index_thw(frames, rows, columns)[0] + first)
            first += frames * rows * columns // self.patches_per_token
        return self.undone(torch.cat(index))

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        attention: Any = self.attention(block)
        held = Held()

        def plain(module: nn.Module, args: tuple[Any, ...]) -> None:
            held.keep("keys", args[0].chunk(2)[1])  # queries and keys, one behind the other

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            queries, keys = _arguments(_INTO, args, kwargs)
            if kept := held.take("keys"):
                told(Heads(queries, keys, kept[0], attention.scale, self._peers))

        return [
            self.part(block, "attn.apply_rotary_emb").register_forward_pre_hook(plain),
            attention.register_forward_pre_hook(before, with_kwargs=True),
        ]


_INTO = ("query", "key")


def heard(
    tower: Tower | None, served: ServedTower, specs: Sequence[EngineSpec], run: Callable[[], T]
) -> tuple[T, dict[Signal, torch.Tensor]]:
    """What a call of the tower gives, and what the specs' compressors read of it.

    Args:
        tower: its hooks are on for this call alone, and only where a compressor reads something.
        served: what is known of it.
        specs: of the images.
        run: calls the tower.

    Returns:
        The result, and each signal over the patches of all images in order, as `Reading.values`.
    """
    signals = dict.fromkeys(signal for spec in specs for signal in spec.compressor.reads())
    if not signals:
        return run(), {}
    assert tower is not None  # refused in `read_spec`
    absolute = {signal: served.absolute(signal) for signal in signals}
    with Reader(tower, list(absolute.values())) as reader:
        result = run()
        reading = reader.take()
    return result, {signal: reading.values[own] for signal, own in absolute.items()}


def of_tokens(
    values: Mapping[Signal, torch.Tensor], patches: torch.Tensor, spec: EngineSpec
) -> dict[Signal, torch.Tensor]:
    """What a spec's compressor reads, for the tokens of an image: the mean over each token's patches.

    Args:
        values: as `heard` gives them.
        patches: int64 ``(n, p)``, for each token its patches among those of all images.
        spec: of the image.
    """
    own = {}
    for signal in spec.compressor.reads():
        index = patches.to(values[signal].device)
        own[signal] = values[signal][index].mean(1) if index.shape[1] > 1 else values[signal][index[:, 0]]
    return own
