"""The larger part of the zoo of trio-vlm: trained models as data. ``trio.zoo`` finds them when this is installed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["__version__", "models"]

__version__ = "0.1.0"


def models() -> Path:
    """The folder with one folder a model, each as ``save_pretrained`` wrote it."""
    return Path(__file__).parent / "models"
