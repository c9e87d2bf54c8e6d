"""What is asked: questions about images with known answers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ...core.images import load_image
from ...errors import InputError
from ..extras import require
from ..jsonlines import read_lines
from .results import COUNTED, OVERALL

__all__ = ["LabelledSample", "Task", "jsonl", "normalise"]

#: Answers less similar than this count as nothing, so that a wrong word is no half-right one.
ANLS_THRESHOLD = 0.5
Text = Annotated[str, Field(pattern=r"\S")]
_FORM = (
    'a line is {"image": PATH, "question": TEXT, "answer": TEXT or [TEXT, ...]}, and may have "kind": TEXT; no text is '
    "empty."
)


class _Line(BaseModel):
    """A line of a file of questions."""

    model_config = ConfigDict(strict=True, extra="forbid")

    image: Text
    question: Text
    answer: Text | Annotated[list[Text], Field(min_length=1)]
    kind: Text = "all"


_SHAPE = TypeAdapter(_Line)


@dataclass(frozen=True)
class LabelledSample:
    """A question about an image.

    Attributes:
        image: the image, or its file.
        question: in words, without a chat template.
        answers: those that count as right.
        kind: sub-task that it belongs to.
        scene: number of the image; questions about one image are not independent.
        item_map: uint8 ``(height, width)``, i + 1 where thing i is, 0 elsewhere; None where nobody knows.
        about: numbers of the things that one must see to answer; empty where nothing in the image matches.
    """

    image: Image.Image | Path = field(repr=False)
    question: str
    answers: tuple[str, ...]
    kind: str = "all"
    scene: int = 0
    item_map: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    about: tuple[int, ...] = ()

    def load(self) -> Image.Image:
        """The image as RGB.

        Raises:
            InputError: its file cannot be read.
        """
        return load_image(self.image) if isinstance(self.image, Path) else self.image

    def is_right(self, answer: str) -> bool:
        """Whether an answer is one of `answers`, up to `normalise`."""
        return normalise(answer) in {normalise(one) for one in self.answers}

    def similarity(self, answer: str) -> float:
        """ANLS of one answer, 0 to 1: the similarity to the nearest of `answers`, 0 below one half; 1 if it is right.

        1 minus Levenshtein's distance over the longer length, without regard to case (Biten et al. 2019, arXiv
        1905.13648, as DocVQA reports it).

        Raises:
            InputError: rapidfuzz is not installed.
        """
        if self.is_right(answer):
            return 1.0
        levenshtein = require("rapidfuzz.distance", "similarity of answers").Levenshtein
        given = answer.strip().casefold()
        best = max(float(levenshtein.normalized_similarity(given, one.strip().casefold())) for one in self.answers)
        return best if best >= ANLS_THRESHOLD else 0.0


@dataclass(frozen=True)
class Task:
    """A set of questions.

    Attributes:
        name: for results.
        version: of the questions; results of other versions cannot be compared.
        samples: the questions.
        max_new_tokens: longest answer.
        facts: what else identifies the set (split, seed, file).
        graded: whether results have the similarity of answers (ANLS) beside the share of right ones.
    """

    name: str
    version: int
    samples: tuple[LabelledSample, ...]
    max_new_tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    graded: bool = False

    @property
    def kinds(self) -> list[str]:
        """Sub-tasks in the order in which they first come."""
        return list(dict.fromkeys(sample.kind for sample in self.samples))

    @property
    def scenes(self) -> int:
        """Number of images."""
        return len({sample.scene for sample in self.samples})

    def fingerprint(self) -> str:
        """SHA-256 of what is asked: questions, answers, sub-tasks, and which image each is about."""
        digest = hashlib.sha256(f"{self.name}/{self.version}/{json.dumps(dict(self.facts), sort_keys=True)}".encode())
        for sample in self.samples:
            where = str(sample.image.name) if isinstance(sample.image, Path) else list(sample.image.size)
            row = [sample.scene, sample.kind, sample.question, *sample.answers, where, list(sample.about)]
            digest.update(json.dumps(row, ensure_ascii=False).encode())
        return digest.hexdigest()


def normalise(answer: str) -> str:
    """An answer without case, articles, punctuation around words and superfluous blanks."""
    text = re.sub(r"(?<!\d)[.,](?!\d)|[.,](?!\d)|[!?;:\"'`()\[\]]", " ", answer.casefold())
    words = [word for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(words) or text.strip()


def jsonl(file: str | Path, *, limit: int | None = None, max_new_tokens: int = 32) -> Task:
    """Questions from a JSONL file: ``{"image": PATH, "question": TEXT, "answer": TEXT or [TEXT, ...]}`` a line.

    A line may have ``"kind"``, the sub-task that it belongs to. Paths are relative to the file's folder.

    Args:
        file: the file.
        limit: only its first lines.
        max_new_tokens: longest answer.

    Raises:
        InputError: the file cannot be read, a line is no such object, or an image is missing; the message has the
            line.
    """
    file = Path(file)
    lines = islice(read_lines(file, _SHAPE, what="data", form=_FORM), limit)
    scenes: dict[Path, int] = {}
    samples = tuple(
        _sample(f"data {str(file)!r}, line {line.number}", line.value, file.parent, scenes) for line in lines
    )
    if not samples:
        raise InputError(f"data {str(file)!r}: it is empty; write one JSON object a line.")
    images = {str(path.name): path.stat().st_size for path in scenes}
    return Task("jsonl", 1, samples, max_new_tokens, {"file": file.name, "images": images})


def _sample(place: str, row: _Line, folder: Path, scenes: dict[Path, int]) -> LabelledSample:
    image = folder / row.image
    if not os.path.isfile(image):  # unlike Path's, False for a name that is too long
        raise InputError(f"{place}: there is no image {str(image)!r}; paths start at the file's folder.")
    if row.kind in (OVERALL, COUNTED):
        raise InputError(f"{place}: the results use the name {row.kind!r} for several sub-tasks; give another `kind`.")
    scene = scenes.setdefault(image.resolve(), len(scenes))
    answers = (row.answer,) if isinstance(row.answer, str) else tuple(row.answer)
    return LabelledSample(image.resolve(), row.question, answers, row.kind, scene)
