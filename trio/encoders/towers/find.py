"""Which tower class a module gets."""

from __future__ import annotations

import warnings

from torch import nn

from ...errors import PluginError, UnsupportedModelError
from .base import TOWERS, Tower

#: Where models keep their vision tower: open_clip's models, its timm wrapper, transformers' models.
_INSIDE = ("visual", "trunk", "vision_model", "vision_tower", "model")


def tower_for(module: nn.Module | Tower) -> Tower:
    """The tower of a module, chosen by asking each registered class; a model that holds a tower will do.

    Raises:
        UnsupportedModelError: no class takes the module, or the one that does refuses the way it is built.
    """
    if isinstance(module, Tower):
        return module
    known: list[type[Tower]] = []
    for name in TOWERS.names():
        try:
            known.append(TOWERS.get(name))
        except PluginError as error:
            warnings.warn(f"tower {name!r} is left out: {error}", stacklevel=3)
    unwrap = getattr(module, "get_base_model", None)  # PEFT
    inner: nn.Module | None = unwrap() if callable(unwrap) else module
    seen: list[str] = []
    while isinstance(inner, nn.Module) and len(seen) < 5:
        seen.append(type(inner).__name__)
        for cls in known:
            if cls.matches(inner):
                return cls(inner)
        inner = next((part for name in _INSIDE if isinstance(part := getattr(inner, name, None), nn.Module)), None)
    raise UnsupportedModelError(
        f"vision tower: nothing registered takes a {' > '.join(seen) or type(module).__name__}; the registered "
        f"ones are {', '.join(TOWERS.names())}; write one (docs/towers.md) and register it with trio.TOWERS"
    )
