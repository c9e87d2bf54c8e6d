"""Stand-ins for methods of a model instance, put in front of them while a pipeline is attached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class StandIn:
    """Takes the place of a bound method on one instance; `remove` brings the method back."""

    def __init__(self, module: nn.Module, name: str) -> None:
        """Prepares a stand-in; nothing changes before `install`."""
        self._module = module
        self._name = name
        self._method: Callable[..., Any] = getattr(module, name)
        functools.update_wrapper(self, self._method)

    def install(self) -> None:
        """Puts the stand-in on the instance."""
        setattr(self._module, self._name, self)

    def remove(self) -> None:
        """Takes it off again."""
        if vars(self._module).get(self._name) is self:
            delattr(self._module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method."""
        return self._method(*args, **kwargs)


class NotedEncoder(StandIn):
    """Notes the arguments of an encoder method: `generate` may call it before the forward, which then sees no grids."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        pixels: tuple[str, ...],
        note: Callable[[Mapping[str, Any]], None],
        done: Callable[[], None],
    ) -> None:
        """Prepares the note.

        Args:
            module: the module that owns the method.
            name: of the method.
            pixels: arguments that are noted by their shape alone, so that no picture is kept alive.
            note: told the arguments by name, None left out, before the method runs.
            done: called after it has run.
        """
        super().__init__(module, name)
        self._pixels = pixels
        self._note = note
        self._done = done
        self._signature = inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Notes the arguments, then encodes."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        self._note(
            {
                name: getattr(value, "shape", None) if name in self._pixels else value
                for name, value in given.items()
                if value is not None
            }
        )
        out = super().__call__(*args, **kwargs)
        self._done()
        return out
