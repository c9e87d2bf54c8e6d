"""Several processes of one evaluation: each asks its share of the batches, and all learn all answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from ...errors import InputError, TrioError

__all__ = ["ALONE", "Processes", "joined", "launched"]

T = TypeVar("T")
#: One process may measure, or load a model, while the others wait; one that has died is noticed at once.
TIMEOUT = timedelta(days=7)
RANK, COUNT, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"


@dataclass(frozen=True)
class Processes:
    """The processes of one evaluation, seen from one of them.

    Every process calls the same methods in the same order, as each waits for the others.

    Attributes:
        rank: which one this is, from 0; the first one writes and speaks.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What each of the processes makes, by rank; it goes from one to the others pickled.

        Raises:
            TrioError: one of the processes raised it.
        """
        if self.count == 1:
            return [make()]
        value: T | None = None
        error: TrioError | None = None
        try:
            value = make()
        except TrioError as raised:
            error = raised
        found = self._all((value, error))
        failed = next((one for _, one in found if one is not None), None)
        if failed is not None:
            raise failed
        return [one for one, _ in found]  # type: ignore[misc]  # None only beside an error

    def together(self, make: Callable[[], T]) -> T:
        """What this process makes, once all have made theirs.

        Raises:
            TrioError: one of the processes raised it.
        """
        kept: list[T] = []
        self.gather(lambda: kept.append(make()))
        return kept[0]

    def device(self, name: str) -> str:
        """Where this process runs: each on an accelerator of its own.

        Args:
            name: as of `trio.zoo.checkpoint.load_model`; a device with a number is left as it is.

        Raises:
            InputError: there are fewer accelerators than processes on this machine.
        """
        if self.count == 1 or name == "cpu" or ":" in name or not torch.accelerator.is_available():
            return name
        kind = str(torch.accelerator.current_accelerator()) if name == "auto" else name
        number, there = int(os.environ.get(LOCAL, 0)), torch.accelerator.device_count()
        if number >= there:
            raise InputError(
                f"device {name!r}: process {self.rank} of {self.count} would run on number {number}, and this machine "
                f"has {there}; launch as many processes as there are accelerators."
            )
        return f"{kind.partition(':')[0]}:{number}"

    def _all(self, value: T) -> list[T]:
        found: list[T | None] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # all are set


#: One process that has no others.
ALONE = Processes()


def launched() -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started with this one; `ALONE` without a launcher."""
    given = [os.environ.get(name, "") for name in (RANK, COUNT)]
    if not all(one.isdecimal() for one in given):
        return ALONE
    rank, count = map(int, given)
    return Processes(rank, count) if count > 1 else ALONE


@contextmanager
def joined(processes: Processes, address: str = "env://") -> Iterator[Processes]:
    """The processes connected for the block, over sockets: what they exchange lies in the memory of the host.

    Args:
        processes: as of `launched`; `ALONE` connects nothing.
        address: where they meet, as of `torch.distributed.init_process_group`.

    Raises:
        InputError: they cannot meet.
    """
    if processes.count == 1:
        yield processes
        return
    try:
        distributed.init_process_group(
            "gloo", init_method=address, rank=processes.rank, world_size=processes.count, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"processes: number {processes.rank} of {processes.count} could not meet the others ({error}); start them "
            "with `accelerate launch` or `torchrun`, or unset RANK and WORLD_SIZE for one process."
        ) from error
    try:
        yield processes
    finally:
        distributed.destroy_process_group()
