"""The interface of vision towers: what readers must know about one kind of them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.shape import TowerShape
from ...core.transfer import HostValues, upload
from ...errors import InputError, UnsupportedModelError
from ...registry import Registry

#: What `Signal.kind` may name, for messages.
KINDS = ("attention", "keys", "hidden", "cls", "groups")


class Held(threading.local):
    """Outputs of submodules, kept until their attention has ended; each thread's own: others may run the tower, too."""

    def __init__(self) -> None:
        """Nothing held; called once in each thread."""
        self._outputs: dict[str, torch.Tensor] = {}

    def keep(self, name: str, output: torch.Tensor) -> None:
        """Holds an output."""
        self._outputs[name] = output.detach()

    def take(self, *names: str) -> list[torch.Tensor]:
        """The outputs, which are then forgotten; an empty list where hooks were put on in the middle of the call."""
        outputs, self._outputs = self._outputs, {}
        return [outputs[name] for name in names] if set(names) <= set(outputs) else []


class Peers(Protocol):
    """The processes that hold equally many other heads of one attention each (tensor parallelism)."""

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensors of all processes, joined along a dimension in the order of their heads."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of the tensors of all processes."""


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one attention, as its own submodules gave them.

    B rows of the batch (1 where the tower packs its inputs), S columns.

    Attributes:
        queries: ``(B, S, heads, head_dim)``, as they meet the keys; where the tower has a class token that of the class
            token may be alone, ``(B, 1, heads, head_dim)``.
        keys: ``(B, S, heads, head_dim)``, as they meet the queries.
        plain_keys: the keys before any rotation; the same tensor where there is none.
        scale: what their products are multiplied with.
        peers: who holds the other heads; None where these are all.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    plain_keys: torch.Tensor
    scale: float
    peers: Peers | None = None


@dataclass(frozen=True)
class Layout:
    """How a call of the tower lays its inputs out in rows: the B x S rows of its hidden states, one after the other.

    Attributes:
        spans: first row of each input, and the row after its last; the rows of an input see each other and no others.
        prefix: rows at the start of each span that are no patches (class token, registers).
        order: int64 ``(P,)``, for each patch in the order of the tower's output its place among the patches in the
            order of the rows; None where that is the same.
    """

    spans: tuple[tuple[int, int], ...]
    prefix: int = 0
    order: torch.Tensor | None = None

    @classmethod
    def batch(cls, inputs: int, rows: int, prefix: int) -> Layout:
        """Inputs of equally many rows each."""
        return cls(tuple((i * rows, (i + 1) * rows) for i in range(inputs)), prefix)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Patches of each input."""
        return tuple(stop - start - self.prefix for start, stop in self.spans)

    def patches(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of ``(R, ...)`` rows that are patches, in the order of the tower's output: ``(P, ...)``."""
        full = self.spans[0][1] - self.spans[0][0]
        if all(stop - start == full for start, stop in self.spans) and len(self.spans) * full == rows.shape[0]:
            picked = rows.reshape(len(self.spans), full, *rows.shape[1:])[:, self.prefix :].flatten(0, 1)
        else:
            picked = torch.cat([rows[start + self.prefix : stop] for start, stop in self.spans])
        return picked if self.order is None else picked[upload(self.order, picked.device)]

    def first_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The first of the ``(R, ...)`` rows of each input: ``(inputs, ...)``."""
        return torch.stack([rows[start] for start, _ in self.spans])


class Tower(ABC):
    """All that readers must know about one kind of vision tower.

    A tower is bound to a module and changes nothing on it. Its submodules are looked up when hooks are put on, so that
    wrappers put on later (LoRA, offloading) are hooked and called in their place.
    """

    #: Whether the first row of each input is a class token.
    has_cls: bool = False
    #: Rows at the start of each input that are no patches.
    prefix: int = 0
    #: Neighbouring patches that become one token as they leave the tower.
    patches_per_token: int = 1
    #: The block whose output makes the features that language models see, counted from the end.
    features_block: ClassVar[int] = -1
    #: `model_type` of the configurations that `cost_shape` describes.
    model_types: ClassVar[frozenset[str]] = frozenset()
    #: Why tokens cannot be merged between the blocks of this kind of tower; empty where they can.
    merging_reason: str = ""

    def __init__(self, module: nn.Module) -> None:
        """Binds the tower.

        Raises:
            UnsupportedModelError: the module is of the right class but built in a way that is not known.
        """
        self.module = module
        #: What the host knows of the tensors that the tower is given, by those who run it.
        self.looked = HostValues()
        self._check()

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this class is made for the module (the vision tower itself)."""

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """What a tower of such a configuration computes, without weights; `crop_tokens` are the model's to say.

        Args:
            config: of the tower, its type one of `model_types`; where a library's models have no configuration
                (`model_types` is empty) the module itself.

        Raises:
            UnsupportedModelError: a number is missing, or this kind of tower is not described.
        """
        raise UnsupportedModelError(f"{cls.__name__} does not say what it costs; write its `cost_shape` (docs/cost.md)")

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, first to last; each takes hidden states first and gives hidden states."""

    @abstractmethod
    def attention(self, block: int) -> nn.Module:
        """The attention module of a block."""

    @abstractmethod
    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """Hooks that tell the queries and keys of a block in each call, after its attention has run."""

    @abstractmethod
    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """Calls the tower: on pixels ``(B, 3, H, W)``, or on its own arguments by name."""

    @abstractmethod
    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of each input."""

    def offers(self) -> frozenset[str]:
        """The kinds of signals that can be read."""
        missing = {*(() if self.has_cls else ("cls",)), *(("groups",) if self.merging_reason else ())}
        return frozenset(KINDS) - missing

    def seeing_block(self, block: int) -> int | None:
        """The first block from `block` on whose attention sees the whole input; None where there is none."""
        return block

    def listen_layout(self, told: Callable[[Layout], None]) -> list[RemovableHandle]:
        """Hooks that tell the layout of each call before its first block runs."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden: torch.Tensor = args[0]
            told(Layout.batch(hidden.shape[0], hidden.shape[1], self.prefix))

        return [self.blocks[0].register_forward_pre_hook(before)]

    def merge_points(self, block: int) -> tuple[nn.Module, nn.Module]:
        """Where tokens of a block can be merged: the norm in front of its feed-forward layer, and that layer.

        Raises:
            UnsupportedModelError: they cannot be; see `merging_reason`.
        """
        reason = self.merging_reason or "its class does not say where"
        raise UnsupportedModelError(
            f"groups: tokens cannot be merged between the blocks of the vision tower {type(self.module).__name__}: "
            f"{reason}; take a compressor that works after the tower"
        )

    def bias_attention(self, block: int, bias: Callable[[], torch.Tensor | None]) -> list[RemovableHandle]:
        """Hooks that add to the attention scores of a block what `bias` gives for each key, float32 ``(B, S)`` or None.

        Raises:
            UnsupportedModelError: as `merge_points`, or the attention that is chosen takes no bias.
        """
        self.merge_points(block)
        raise NotImplementedError(f"{type(self).__name__} says where tokens merge, but not how attention is biased")

    def part(self, block: int, path: str) -> nn.Module:
        """A submodule of a block."""
        return self.blocks[block].get_submodule(path)

    def refuse(self, reason: str) -> UnsupportedModelError:
        """The error that this tower cannot be read."""
        return UnsupportedModelError(
            f"vision tower {type(self.module).__name__}: {reason}; write a trio.Tower for it (docs/towers.md) and "
            "register it with trio.TOWERS"
        )

    def _check(self) -> None:
        try:
            if not len(self.blocks):
                raise self.refuse("it has no blocks")
            self.attention(0)
        except AttributeError as error:
            raise self.refuse(f"its blocks are not built as those known to {type(self).__name__}: {error}") from error


#: Towers by name.
TOWERS: Registry[Tower] = Registry("tower", Tower)


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether the module's class or one of its bases has one of the full names; imports nothing."""
    found = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return any(name in found for name in names)


def split_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """``(..., heads * head_dim)`` as ``(..., heads, head_dim)``."""
    return rows.view(*rows.shape[:-1], heads, rows.shape[-1] // heads)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states that a block gave, alone or first in a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def pixel_grid(pixels: torch.Tensor, patch: tuple[int, int]) -> list[tuple[int, int]]:
    """The grid of each image of ``(B, 3, H, W)`` cut into patches of the given height and width.

    Raises:
        InputError: the pixels have another shape.
    """
    if pixels.ndim != 4:
        raise InputError(f"images: found shape {tuple(pixels.shape)}; give pixels of shape (images, 3, height, width)")
    return [(pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])] * pixels.shape[0]


def pixels_of(images: torch.Tensor | Mapping[str, Any]) -> torch.Tensor:
    """The pixels, given alone or as the one argument `pixel_values`.

    Raises:
        InputError: other arguments are given.
    """
    if not isinstance(images, Mapping):
        return images
    if set(images) != {"pixel_values"}:
        raise InputError(f"images: found {', '.join(images)}; this tower takes pixel_values alone")
    pixels: torch.Tensor = images["pixel_values"]
    return pixels


def pair(size: Any) -> tuple[int, int]:
    """A size given once or as height and width."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
