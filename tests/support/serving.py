"""What tests of the batcher and of the service share: a model that can be stopped, and questions with answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

import trio
from benchmarks import service
from trio.batch import PromptRequest
from trio.measure.shapesvqa.examples import Example, examples


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits; fails where the condition does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """Holds the model before its forwards while it is shut, and counts them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._open = threading.Event()
        self._open.set()
        self.forwards = 0
        self._handle = model.register_forward_pre_hook(self._hold)

    def _hold(self, module: Any, args: Any) -> None:
        self.forwards += 1
        assert self._open.wait(60)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """The model stands still in the block."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def remove(self) -> None:
        self._open.set()
        self._handle.remove()


def asked(count: int) -> list[Example]:
    """Questions about scenes."""
    return examples("test", scenes=count // 6 + 4)[:count]


def alone(
    model: Any, processor: Any, spec: Any, images: list[Image.Image], question: str, *, max_new_tokens: int
) -> tuple[str, int, list[list[int]]]:
    """Text, tokens and kept places of a question alone, by transformers and an attached pipeline."""
    pipeline = trio.Pipeline.from_spec(spec, model)
    found = service.alone(model, processor, pipeline, images, question, max_new_tokens)
    return found["text"], found["new_tokens"], found["places"]


def request(one: Example, **more: Any) -> PromptRequest:
    """A request for a question."""
    return PromptRequest(one.question, [one.image], **more)
