from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent


def images(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(HERE / name) for name in doc["images"]]


def question(doc: dict[str, Any]) -> str:
    return str(doc["question"])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
