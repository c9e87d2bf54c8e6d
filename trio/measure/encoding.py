"""Images that are encoded once for several specs: the encoder's work does not depend on what happens behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.base import Adapter
from ..core.hooking import MethodPatch, Owner
from ..core.upstream import copied_output, features_of
from ..pipeline import Pipeline
from .answering import wait

__all__ = ["LIMIT", "EncodedImages"]

#: Bytes of features that are kept at most; what does not fit is encoded again.
LIMIT = 2**30


@dataclass(frozen=True)
class _Encoding:
    """One call of an encoder method: its arguments, what it gave, and the seconds that it took."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    seconds: float


class EncodedImages:
    """What a model's encoder methods gave, by the tensors that they were given.

    Inside `reused` a call with the same tensors (the same objects, unchanged) gets what the first one gave. Nothing is
    ever dropped for something newer: batches that come in turn would then push each other out.

    Attributes:
        kept_bytes: bytes of features that are kept.
        saved_seconds: what the calls would have taken that were spared since `clear`, as the first ones were measured.
        encoded: calls that the model's encoders ran.
    """

    def __init__(self, adapter: Adapter, *, limit: int = LIMIT) -> None:
        """Begins with nothing; `limit` is in bytes, and 0 encodes everything anew."""
        self.kept_bytes, self.saved_seconds, self.encoded = 0, 0.0, 0
        self._adapter, self._limit = adapter, limit
        self._kept: list[_Encoding] = []

    def clear(self) -> None:
        """Forgets everything, so that images are encoded (and that is timed) anew."""
        self._kept.clear()
        self.kept_bytes, self.saved_seconds = 0, 0.0

    @contextmanager
    def reused(self, pipeline: Pipeline | None) -> Iterator[None]:
        """For the block, images that were encoded before are not encoded again.

        Args:
            pipeline: the one that is attached within the block, not yet attached. One whose compressor reads the vision
                tower has to see it at work, and some merge tokens inside it: for such a one nothing is reused or kept.
        """
        if pipeline is not None and pipeline.reads_tower:
            yield
            return
        owner = Owner("encoded images")
        patches = [
            _ReusedEncoder(self, self._adapter.multimodal, name, owner=owner)
            for name in self._adapter.encoders.values()
        ]
        owner.attach()
        try:
            for patch in patches:
                patch.install()
            yield
        finally:
            owner.detach()
            for patch in reversed(patches):
                patch.remove()

    def encode(self, method: str, encoder: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an encoder gives, from memory where it was called with the same tensors before.

        Args:
            method: its name.
            encoder: the model's own method.
            args: of the call.
            kwargs: of the call.
        """
        for one in self._kept:
            if one.method == method and _same(one.args, args) and _same(one.kwargs, kwargs):
                self.saved_seconds += one.seconds
                return copied_output(one.output)
        device: Any = self._adapter.model.device
        wait(device)
        start = time.perf_counter()
        output = encoder(*args, **kwargs)
        wait(device)
        seconds = time.perf_counter() - start
        self.encoded += 1
        kept = copied_output(output) if self._adapter.fallback else features_of(output)
        size = _bytes(kept)
        if self.kept_bytes + size <= self._limit:
            self.kept_bytes += size
            self._kept.append(_Encoding(method, args, dict(kwargs), kept, seconds))
        return output


class _ReusedEncoder(MethodPatch):
    """Stands in front of an encoder method while encodings are reused."""

    def __init__(self, memory: EncodedImages, module: torch.nn.Module, name: str, *, owner: Owner) -> None:
        super().__init__(module, name, owner=owner)
        self._memory, self._encoder = memory, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.attached:
            return super().__call__(*args, **kwargs)
        return self._memory.encode(self._encoder, self._method, args, kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are one: tensors by identity, so that no device is asked; what is not known differs."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str) and one == other


def _bytes(output: Any) -> int:
    """Bytes that are alive while an output is: each storage once."""
    storages: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for one in [*value.values(), *getattr(value, "__dict__", {}).values()]:
                note(one)
        elif isinstance(value, list | tuple):
            for one in value:
                note(one)

    note(output)
    return sum(storages.values())
