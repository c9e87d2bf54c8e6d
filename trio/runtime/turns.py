"""Threads that share one model take turns, in the order in which they ask."""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import nn

from ..errors import InputError

#: Seconds between two looks at whether the thread whose turn it is has gone without leaving.
LOOK = 0.05


@dataclass(eq=False)
class Turn:
    """A place in the queue of a model.

    Attributes:
        code: the function within which the turn is used; None: until it is left.
        frame: the call of that function, see `frame_of`; None: not known, so that the turn ends when it is left.
        thread: the thread that asked.
        used: whether it is still used, asked from any thread; where not, it is over with `frame`.
    """

    code: CodeType | None = None
    frame: FrameType | None = field(default=None, repr=False)
    thread: threading.Thread = field(default_factory=threading.current_thread)
    used: Callable[[], bool] | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread asked."""
        return self.thread is threading.current_thread()

    @property
    def is_over(self) -> bool:
        """Whether nobody uses it any more, though it was not left: an interrupt or the end of a thread came before."""
        if not self.thread.is_alive():
            return True
        if self.used is not None and self.used():
            return False
        return self.used is not None if self.frame is None else not is_running(self.frame)


class Turns:
    """The queue of the threads that want one model. The first one has its turn.

    The queue is the only state: an interrupt between two lines leaves a turn that is over, and a waiting thread removes
    it.
    """

    def __init__(self) -> None:
        """An empty queue."""
        self._queue: deque[Turn] = deque()
        self._changed = threading.Condition()

    def wait(self, turn: Turn, seconds: float) -> bool:
        """Queues up and waits.

        Args:
            turn: of this thread. An older one of the same thread is taken for one that an interrupt left.
            seconds: at most; 0 does not wait, infinity waits as long as it takes.

        Returns:
            Whether it is this thread's turn. If not, the thread is not in the queue any more.
        """
        end = time.monotonic() + seconds
        try:
            with self._changed:
                for other in [other for other in self._queue if other.thread is turn.thread]:
                    self._queue.remove(other)
                self._queue.append(turn)
                while not self._is_first(turn):
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(min(left, LOOK))
                else:
                    return True
        except BaseException:
            self.leave(turn)
            raise
        self.leave(turn)
        return False

    def leave(self, turn: Turn) -> None:
        """Ends a turn, or gives up waiting for it; does nothing where it has ended."""
        with self._changed:
            if turn in self._queue:
                self._queue.remove(turn)
            self._changed.notify_all()

    def has(self, turn: Turn) -> bool:
        """Whether it is a thread's turn now."""
        queue = self._queue
        return bool(queue) and queue[0] is turn

    @property
    def waiting(self) -> int:
        """Threads in the queue, the first one included."""
        return len(self._queue)

    def _is_first(self, turn: Turn) -> bool:
        queue = self._queue
        while queue[0] is not turn and queue[0].is_over:
            queue.popleft()
        return queue[0] is turn


#: One queue for each decoder: several pipelines share a model, and nothing may be written on it.
_QUEUES: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_QUEUES_LOCK = threading.Lock()


def turns_of(decoder: nn.Module) -> Turns:
    """The queue of a model, by the part of it that all its wrappers share."""
    with _QUEUES_LOCK:
        return _QUEUES.setdefault(decoder, Turns())


def seconds_of(wait: bool | float) -> float:
    """How long to wait: False is not at all, True is as long as it takes, a number is seconds.

    Raises:
        InputError: the number is negative or not a number.
    """
    if isinstance(wait, bool):
        return math.inf if wait else 0.0
    if not isinstance(wait, (int, float)) or not wait >= 0:
        raise InputError(f"wait: found {wait!r}; give True, False or a number of seconds from 0")
    return float(wait)


def frame_of(code: CodeType, receiver: Any) -> FrameType | None:
    """The innermost call of a method of an object within which this thread stands; None where there is none.

    Args:
        code: of the method.
        receiver: the object.
    """
    frame = sys._getframe().f_back
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is receiver):
        frame = frame.f_back
    return frame


def is_running(frame: FrameType) -> bool:
    """Whether a call has not ended yet, asked from any thread.

    The frame alone is asked: Python 3.11 crashes where the callers of a call are looked up in a thread that runs on
    meanwhile. A call that has ended loses its local variables by this.
    """
    try:
        frame.clear()  # refused while the call runs
    except RuntimeError:
        return True
    return False
