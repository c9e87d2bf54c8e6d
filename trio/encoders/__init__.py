"""The encoder side: compressors (one method a file), vision towers and their readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .direct import compress

__all__ = ["compress"]


def __getattr__(name: str) -> Any:
    """Resolves `compress` when it is first used: importing a compressor imports no tower."""
    if name != "compress":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .direct import compress

    globals()[name] = compress
    return compress
