"""Batches prepared in a thread beside the model: decoding images and the processor's work need no accelerator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["AHEAD", "prepared"]

Item = TypeVar("Item")
Batch = TypeVar("Batch")

#: Batches that wait for the model at most.
AHEAD = 2


def prepared(
    prepare: Callable[[Item], Batch], items: Iterable[Item], *, ahead: int = AHEAD
) -> Generator[Batch, None, None]:
    """What `prepare` makes of each item, in order; the next ones are made in one thread while the caller works.

    An error of `prepare` or of `items` is raised where its item's turn comes, as if it had been called there.

    Args:
        prepare: runs in a thread of its own, one item after the other.
        items: its arguments; each is taken in that thread, just before it is prepared.
        ahead: items that are made before they are asked for; 0: none, and no thread.
    """
    coming = iter(items)

    def step() -> list[Batch]:
        """The next one; nothing behind the last."""
        return [prepare(item) for item in islice(coming, 1)]

    if ahead < 1:
        while made := step():
            yield made[0]
        return
    with ThreadPoolExecutor(1, thread_name_prefix="trio-prepare") as thread:
        waiting: deque[Future[list[Batch]]] = deque(thread.submit(step) for _ in range(ahead))
        try:
            while made := waiting.popleft().result():
                waiting.append(thread.submit(step))
                yield made[0]
        finally:
            for future in waiting:
                future.cancel()
