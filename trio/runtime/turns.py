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
        receiver: the `self` of that function; None: of any.
        thread: the thread that asked.
        used: whether it is still used, asked from any thread; where not, it is over outside `code`.
        outermost: the first frame of the thread.
    """

    code: CodeType | None = None
    receiver: Any = None
    thread: threading.Thread = field(default_factory=threading.current_thread)
    used: Callable[[], bool] | None = None
    outermost: FrameType = field(default_factory=lambda: _outermost(), repr=False)

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
        if self.code is None:
            return self.used is not None
        return not is_within(self.thread.ident, self.code, self.receiver, outermost=self.outermost)


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


def is_within(thread: int | None, code: CodeType, receiver: Any, *, outermost: FrameType | None = None) -> bool:
    """Whether a thread stands within a method of an object, or in what it calls.

    Args:
        thread: its number.
        code: of the method.
        receiver: the object; None: of any.
        outermost: the thread's first frame; with it the answer is True where in doubt: a frame that has just ended,
            or a generator that has just yielded, has no caller.
    """
    frame = None if thread is None else sys._current_frames().get(thread)
    last = None
    while frame is not None:
        if frame.f_code is code and (receiver is None or frame.f_locals.get("self") is receiver):
            return True
        frame, last = frame.f_back, frame
    return outermost is not None and last is not outermost


def _outermost() -> FrameType:
    """The first frame of this thread."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame
