"""Readers: hooks on a stock vision tower that compute the signals which compressors ask for, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.hooking import Owner, adopt, hook_ids, remove_hooks
from ...core.tokens import Signal
from ...core.transfer import HostValues, upload
from ...errors import AttachError, InputError, UnsupportedModelError
from ..towers.base import Heads, Layout, Tower, hidden_of
from .attention import as_one_head, class_row, received
from .inside import Merger


@dataclass(frozen=True)
class Reading:
    """What was read in the calls of a tower.

    Attributes:
        values: by signal, over all patches of all inputs in order, class token and registers left out: ``attention``
            float32 ``(P,)``, ``keys`` float32 ``(P, heads, head_dim)``, ``hidden`` ``(P, D)``; ``groups`` int64
            ``(P,)``, counted within each input; ``cls`` ``(inputs, D)``.
        inputs: patches of each input of the tower: each image or tile of a batch, each frame of a packed grid.
    """

    values: Mapping[Signal, torch.Tensor]
    inputs: tuple[int, ...]


@dataclass
class _Call:
    """One call of the tower while it runs."""

    layout: Layout
    values: dict[Signal, torch.Tensor] = field(default_factory=dict)


class Reader:
    """Reads signals off a tower in all its calls between `attach` and `detach`.

    The tower keeps its attention implementation and is never asked for its attention matrices: queries and keys come
    from hooks on its own submodules, and only the rows that a signal needs are computed from them.
    """

    def __init__(
        self, tower: Tower, signals: Sequence[Signal], *, keep: Callable[[int], int | None] | None = None
    ) -> None:
        """Checks that the tower gives the signals.

        Args:
            tower: the tower.
            signals: what to read.
            keep: how many of the patches of an input are to be left where tokens are merged inside (``groups``); None:
                all.

        Raises:
            UnsupportedModelError: the tower does not give a signal, or has no such block.
            InputError: a signal makes no sense.
        """
        self.tower = tower
        self.signals = tuple(dict.fromkeys(signals))
        self._blocks = {signal: _block(tower, signal) for signal in self.signals}
        self._merger = self._bind_merger(keep)
        self._handles: list[RemovableHandle] = []
        self._owner = self._works_for = Owner("reader")
        self._before: set[tuple[int, int]] | None = None  # the tower's hooks when attaching began
        self._calls: list[_Call] = []

    def _bind_merger(self, keep: Callable[[int], int | None] | None) -> Merger | None:
        groups = [signal for signal in self.signals if signal.kind == "groups"]
        if not groups:
            return None
        last = self._blocks[groups[0]]
        for signal in self.signals:
            if signal.kind in ("attention", "keys") and self._blocks[signal] <= last:
                raise InputError(
                    f"signal {_name(signal)}: tokens are merged in that block, so that it has no value for each patch; "
                    f"read it behind block {last}, or merge in fewer blocks"
                )
        if len(groups) > 1:
            raise InputError(f"signals: tokens cannot be merged in {len(groups)} ways at once; ask for groups once")
        return Merger(self.tower, last, groups[0].merges, keep, works=lambda: self._works_for.attached)

    def __enter__(self) -> Reader:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self, owner: Owner | None = None) -> None:
        """Puts the hooks on.

        Args:
            owner: whose they are; the reader's own by default.

        Raises:
            AttachError: they are on already.
        """
        if self._handles:
            raise AttachError("reader: it is attached already; detach it first (a `with` block does so at its end)")
        if self._before is not None:
            self.detach()  # an interrupted attach
        self._calls = []
        self._works_for = self._owner if owner is None else owner
        self._before = hook_ids(self.tower.module)
        try:
            self._handles += self.tower.listen_layout(self._start)
            self._hook_blocks()
            for handle in self._handles:
                adopt(handle, self._works_for)
            self._before = None
            self._owner.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Takes the hooks off and forgets what was read."""
        self._owner.detach()
        before = self._before
        if before is not None:  # attaching was interrupted, perhaps before a handle was kept
            remove_hooks(self.tower.module, lambda module, number, hook: (id(module), number) not in before)
            self._before = None
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], []

    def looked(self, values: HostValues) -> None:
        """What the host knows of the tensors that the tower is given: it need not look at them again."""
        self.tower.looked = values

    def clear(self) -> None:
        """Forgets what was read, so that the next `take` starts afresh (a call may have failed half-way)."""
        self._calls = []

    def take(self) -> Reading:
        """What was read in the calls since the last `take` (or since `attach`), which is then forgotten.

        Raises:
            InputError: the tower was not called, or a call ended before the blocks that are read.
        """
        calls, self._calls = self._calls, []
        if not calls:
            raise InputError(
                "reader: the tower was not called since the last reading; call it with the reader attached"
            )
        for call in calls:
            for signal in self.signals:
                if signal not in call.values:
                    raise InputError(
                        f"reader: a call of {type(self.tower.module).__name__} ended before block "
                        f"{self._blocks[signal]}, where {_name(signal)} is read; let the whole tower run"
                    )
        values = {
            signal: torch.cat([_finish(signal, call) for call in calls])
            if len(calls) > 1
            else _finish(signal, calls[0])
            for signal in self.signals
        }
        return Reading(values, tuple(patches for call in calls for patches in call.layout.inputs))

    def _start(self, layout: Layout) -> None:
        if self._works_for.attached:
            self._calls.append(_Call(layout))

    def _hook_blocks(self) -> None:
        if self._merger is not None:  # first, so that what is read of a block's output has a row for each patch
            (groups,) = (signal for signal in self.signals if signal.kind == "groups")
            self._handles += self._merger.hooks(partial(self._group, groups))
        by_block: dict[int, list[Signal]] = {}
        for signal, block in self._blocks.items():
            by_block.setdefault(block, []).append(signal)
        for block, signals in by_block.items():
            outputs = [signal for signal in signals if signal.kind in ("hidden", "cls")]
            inner = [signal for signal in signals if signal.kind in ("attention", "keys")]
            if inner:
                self._handles += self.tower.listen(block, partial(self._hear, inner))
            if outputs:
                hook = partial(self._keep, outputs)
                self._handles.append(self.tower.blocks[block].register_forward_hook(hook))

    def _group(self, signal: Signal, first: torch.Tensor) -> None:
        self._calls[-1].values[signal] = first - self.tower.prefix

    def _keep(self, signals: Sequence[Signal], module: nn.Module, args: Any, output: Any) -> None:
        if not self._works_for.attached:
            return
        rows = hidden_of(output).detach()
        self._calls[-1].values.update(dict.fromkeys(signals, rows))

    @torch.no_grad()
    def _hear(self, signals: Sequence[Signal], heads: Heads) -> None:
        if not self._works_for.attached:
            return
        call = self._calls[-1]
        for signal in signals:
            if signal.kind == "keys":
                # A slice of a fused projection would keep all of it alive until the end of the call.
                keys = heads.plain_keys if heads.peers is None else heads.peers.gather(heads.plain_keys, 2)
                call.values[signal] = keys if _owns_storage(keys) else keys.clone()
            else:
                call.values[signal] = self._attention(heads, signal, call.layout)

    def _attention(self, heads: Heads, signal: Signal, layout: Layout) -> torch.Tensor:
        queries, keys, scale, peers = heads.queries, heads.keys, heads.scale, heads.peers
        if self.tower.has_cls:
            queries = queries[:, :1]
        if signal.heads == "one":
            if peers is not None:  # a softmax over all heads together needs them all
                queries, keys, peers = peers.gather(queries, 2), peers.gather(keys, 2), None
            queries, keys, scale = as_one_head(queries), as_one_head(keys), (keys.shape[2] * keys.shape[3]) ** -0.5
        if self.tower.has_cls:  # its inputs are rows of a batch
            values = class_row(queries[:, 0], keys, scale)[:, layout.prefix :].flatten()
        else:
            values = _received(queries.flatten(0, 1), keys.flatten(0, 1), scale, layout)
        values = values if peers is None else peers.mean(values)
        return values if layout.order is None else values[upload(layout.order, values.device)]


def _received(queries: torch.Tensor, keys: torch.Tensor, scale: float, layout: Layout) -> torch.Tensor:
    """Attention received by the patches, float32 ``(P,)`` in the order of the rows: inputs of one length together.

    Args:
        queries: ``(R, heads, head_dim)``, all rows of a call.
        keys: likewise.
        scale: what products are multiplied with.
        layout: of the call.
    """
    by_length: dict[int, list[int]] = {}
    for number, (start, stop) in enumerate(layout.spans):
        by_length.setdefault(stop - start, []).append(number)
    rows = [keys] * len(layout.spans)
    for numbers in by_length.values():
        spans = [layout.spans[number] for number in numbers]
        values = received(_of_spans(queries, spans), _of_spans(keys, spans), scale)[:, layout.prefix :]
        if len(by_length) == 1:
            return values.flatten()
        for number, row in zip(numbers, values.unbind(0), strict=True):
            rows[number] = row
    return torch.cat(rows)


def _of_spans(rows: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """``(G, S, ...)``, the rows of G spans of one length; a view where they follow each other."""
    (first, stop), (_, last) = spans[0], spans[-1]
    if last - first == len(spans) * (stop - first):
        return rows[first:last].view(len(spans), -1, *rows.shape[1:])
    return torch.stack([rows[start:stop] for start, stop in spans])


def _owns_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _finish(signal: Signal, call: _Call) -> torch.Tensor:
    """A signal of one call, flat over its patches."""
    value = call.values.pop(signal)
    with torch.no_grad():
        if signal.kind == "attention":
            return value
        if signal.kind == "groups":
            return call.layout.patches(value.flatten())
        rows = value if value.ndim == 2 else value.flatten(0, 1)  # packed towers have no batch dimension
        if signal.kind == "cls":
            return call.layout.first_rows(rows)
        patches = call.layout.patches(rows)
        return patches.float() if signal.kind == "keys" else patches


def _name(signal: Signal) -> str:
    return f"{signal.kind!r} of block {signal.layer}"


def _reason(tower: Tower, signal: Signal) -> str:
    """Why a tower does not give a signal, as the end of a sentence."""
    if signal.kind == "groups" and tower.merging_reason:
        return f": {tower.merging_reason}"
    return "; it has no class token" if signal.kind == "cls" else ""


def _block(tower: Tower, signal: Signal) -> int:
    """The block that a signal is read at, counted from 0."""
    name, offered, depth = type(tower.module).__name__, tower.offers(), len(tower.blocks)
    if signal.kind not in offered:
        raise UnsupportedModelError(
            f"signal {_name(signal)}: the vision tower {name} does not give it"
            f"{_reason(tower, signal)}. It gives {', '.join(sorted(offered))}; take "
            "a compressor that reads those"
        )
    if signal.merges is not None and signal.kind != "groups":
        raise InputError(f"signal {_name(signal)}: merges is for groups; leave it out")
    if signal.heads == "one" and signal.kind != "attention":
        raise InputError(
            f"signal {_name(signal)}: heads='one' is a way to read attention; leave it out for {signal.kind}"
        )
    block = signal.layer + depth if signal.layer < 0 else signal.layer
    if not 0 <= block < depth:
        raise UnsupportedModelError(
            f"signal {_name(signal)}: the vision tower {name} has {depth} blocks, 0 to {depth - 1} or -{depth} to -1"
        )
    if signal.kind in ("hidden", "cls", "groups"):
        return block
    seeing = tower.seeing_block(block)
    if seeing is None:
        raise UnsupportedModelError(
            f"signal {_name(signal)}: in the vision tower {name} no block from there on sees a whole image; name an "
            "earlier one"
        )
    return seeing
