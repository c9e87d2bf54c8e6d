"""The promises of the runtime, one file a promise; each gives the cases that `check_adapter` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..results import Case
from . import attention, batch, decode, generation, identity, lost, oracle, refusals, reversibility

if TYPE_CHECKING:
    from ..bench import Bench

#: By name, in the order in which they are checked.
PROMISES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "identity": identity.cases,
    "reversibility": reversibility.cases,
    "decode": decode.cases,
    "oracle": oracle.cases,
    "batch": batch.cases,
    "attention": attention.cases,
    "generation": generation.cases,
    "refusals": refusals.cases,
    "nothing-lost": lost.cases,
}
