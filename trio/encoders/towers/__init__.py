"""Vision towers: what readers must know about each kind, one family a file."""

from .base import Heads, Layout, Tower
from .find import tower_for, tower_shape

__all__ = ["Heads", "Layout", "Tower", "tower_for", "tower_shape"]
