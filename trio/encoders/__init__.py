"""The encoder side: compressors (one method a file), vision towers and their readers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .direct import compress
    from .features import compress_features

__all__ = ["compress", "compress_features"]

_MODULES = {"compress": "direct", "compress_features": "features"}


def __getattr__(name: str) -> Any:
    """Resolves the public functions when they are first used: importing a compressor imports no tower."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = function
    return function
