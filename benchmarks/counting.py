"""Counts what a call does, operator by operator: launches, work and the largest tensor; the same on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trio.errors import InputError

#: Libraries of operators whose work their outputs show.
_KNOWN = ("aten", "prim", "prims")


@dataclass
class Counted:
    """What a call did.

    Attributes:
        launches: operators that are no views.
        work: FLOPs of matrix products, and one for each number that another operator writes.
        largest: bytes of the largest tensor that was made.
    """

    launches: int = 0
    work: int = 0
    largest: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace not in _KNOWN:  # its inside would run uncounted
            raise InputError(f"count: {func} is one operator of a library of its own; count what it is made of.")
        out = func(*args, **(kwargs or {}))
        if _is_view(func):
            return out
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        counted = self.counted
        counted.launches += 1
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            counted.work += sum(tensor.numel() for tensor in made)
        else:
            counted.work += int(formula(*args, **(kwargs or {}), out_val=out))
        counted.largest = max([counted.largest, *(tensor.numel() * tensor.element_size() for tensor in made)])
        return out


def _is_view(func: Any) -> bool:
    """An output that shares an input's memory without writing to it."""
    returned = [one.alias_info for one in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def count(call: Callable[[], Any]) -> Counted:
    """Runs a call and counts."""
    with _Counter() as counter:
        call()
    return counter.counted
