"""Which tower class a module gets."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ...core.shape import TowerShape
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
    known = _towers()
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


def tower_shape(config: Any) -> TowerShape:
    """What a tower computes, as the class says that is registered for its `model_type`.

    Args:
        config: the tower's configuration, or a module that `tower_for` takes (on the device `meta` will do).

    Raises:
        UnsupportedModelError: no class describes it, or a number is missing.
    """
    if isinstance(config, nn.Module):
        tower = tower_for(config)
        return tower.cost_shape(tower.module.config if tower.model_types else tower.module)
    kind = str(getattr(config, "model_type", ""))
    known = _towers()
    for cls in known:
        if kind in cls.model_types:
            return cls.cost_shape(config)
    types = sorted({name for cls in known for name in cls.model_types})
    raise UnsupportedModelError(
        f"the vision tower {kind or type(config).__name__!r} is not one that the cost formulas describe "
        f"({', '.join(types)}). Write Tower.cost_shape for it, or build a ModelShape by hand; `tower=None` leaves the "
        "tower out."
    )


def _towers() -> list[type[Tower]]:
    """All classes that can be loaded."""
    known: list[type[Tower]] = []
    for name in TOWERS.names():
        try:
            known.append(TOWERS.get(name))
        except PluginError as error:
            warnings.warn(f"tower {name!r} is left out: {error}", stacklevel=4)
    return known
