"""The benchmark behind `trio bench`: a model of true shape or the user's own, full beside compressed, by the clock."""

from .architectures import ARCHITECTURES, Architecture, architecture
from .build import build, config_of
from .machine import Machine, describe
from .measure import BenchSettings, measure
from .prompts import ImagePrompts, NoisePrompts, Prompts
from .report import BenchReport, BenchRow, SpeedTarget, SpeedVerdict

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BenchReport",
    "BenchRow",
    "BenchSettings",
    "ImagePrompts",
    "Machine",
    "NoisePrompts",
    "Prompts",
    "SpeedTarget",
    "SpeedVerdict",
    "architecture",
    "build",
    "config_of",
    "describe",
    "measure",
]
