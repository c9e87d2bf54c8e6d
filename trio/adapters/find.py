"""Which adapter a model gets."""

from __future__ import annotations

import warnings

from torch import nn

from ..errors import PluginError, UnsupportedModelError
from .base import ADAPTERS, Adapter


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model within a PEFT wrapper; any other model unchanged."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model, chosen by asking each registered one, fallbacks last.

    Raises:
        UnsupportedModelError: no adapter takes the model; the message says what it lacks.
    """
    model = base_model(model)
    for cls in _adapters():
        if cls.matches(model):
            return cls(model)
    raise UnsupportedModelError(
        f"model: {type(model).__name__} is no transformers model, and none of the adapters takes it "
        f"({', '.join(ADAPTERS.names())}); write one (docs/add-an-adapter.md) and register it with trio.ADAPTERS"
    )


def families() -> dict[str, type[Adapter]]:
    """By `model_type`, the adapter that describes such configurations (`Adapter.model_types`)."""
    return {kind: cls for cls in reversed(_adapters()) for kind in cls.model_types}


def tiny_families() -> dict[str, type[Adapter]]:
    """Those of `families` that make tiny models (`Adapter.tiny_config`)."""
    plain = Adapter.tiny_config.__func__  # type: ignore[attr-defined]  # of a class method
    return {kind: cls for kind, cls in families().items() if cls.tiny_config.__func__ is not plain}  # type: ignore[attr-defined]  # likewise


def _adapters() -> list[type[Adapter]]:
    """All adapters that can be loaded, fallbacks last."""
    known = []
    for name in ADAPTERS.names():
        try:
            known.append(ADAPTERS.get(name))
        except PluginError as error:
            warnings.warn(f"adapter {name!r} is left out: {error}", stacklevel=4)
    return sorted(known, key=lambda adapter: adapter.fallback)
