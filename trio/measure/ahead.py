"""Batches prepared in a thread beside the model: decoding images and the processor's work need no accelerator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["prepared"]

Item = TypeVar("Item")
Batch = TypeVar("Batch")

#: Batches that wait for the model at most.
AHEAD = 2


def prepared(prepare: Callable[[Item], Batch], items: Sequence[Item], *, ahead: int = AHEAD) -> Iterator[Batch]:
    """What `prepare` makes of each item, in order; the next ones are made in one thread while the caller works.

    An error of `prepare` is raised where its item's turn comes, as if it had been called there.

    Args:
        prepare: runs in a thread of its own, one item after the other.
        items: its arguments.
        ahead: items that are made before they are asked for; 0: none, and no thread.
    """
    if ahead < 1:
        yield from map(prepare, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="trio-prepare") as thread:
        coming = iter(items)
        waiting: deque[Future[Batch]] = deque(thread.submit(prepare, item) for item in islice(coming, ahead))
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(thread.submit(prepare, item) for item in islice(coming, 1))
                yield batch
        finally:
            for future in waiting:
                future.cancel()
