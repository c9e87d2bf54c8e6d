"""Vision towers: what readers must know about each kind, one family a file."""

from trio.encoders.towers.base import Heads, Layout, Tower
from trio.encoders.towers.find import tower_for

__all__ = ["Heads", "Layout", "Tower", "tower_for"]
