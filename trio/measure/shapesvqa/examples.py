"""Questions on held-out scenes, a list of plain examples: for fidelity, tuning, and measuring the zoo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from .questions import KINDS, Asker
from .scenes import Box, Split, draw_scene
from .views import varied_scene


@dataclass(frozen=True)
class Example:
    """A question about a held-out scene.

    Attributes:
        image: The image.
        question: The question in words.
        answer: The expected answer.
        kind: Type of the question.
        scene: Number of the scene; questions of one scene are not independent.
        boxes: Left, top, right, bottom of the things that the question is about; empty where nothing matches.
        detail: Finer type: for existence, how hard the negative is.
    """

    image: Image.Image = field(repr=False)
    question: str
    answer: str
    kind: str
    scene: int
    boxes: tuple[Box, ...]
    detail: str = ""


def examples(
    split: Split = "test",
    seed: int = 0,
    scenes: int = 400,
    kinds: Sequence[str] = tuple(KINDS),
    size: tuple[int, int] = (168, 168),
    cell: int = 56,
    varied: bool = False,
) -> list[Example]:
    """Questions on held-out scenes, at most one of each type a scene, answers balanced within each type.

    The first scenes of a larger set are the same as those of a smaller one.

    Args:
        split: ``test``, ``validation``, or ``novel`` for colour-shape pairs, textures and slants never trained on.
        seed: Seed of the scenes.
        scenes: How many.
        kinds: Types of questions.
        size: Width and height of the images.
        cell: Size of a grid cell of the scenes.
        varied: Images of many sizes and aspect ratios instead of ``size`` and ``cell``.
    """
    asker, found = Asker(), []
    for index in range(scenes):
        scene = varied_scene(split, seed, index) if varied else draw_scene(split, seed, index, size, cell)
        for kind in kinds:
            question = asker.ask(scene, kind, random.Random(f"trio-examples/{split}/{seed}/{index}/{kind}"))
            if question is not None:
                boxes = tuple(scene.items[i].box for i in question.about)
                found.append(Example(scene.image, question.text, question.answer, kind, index, boxes, question.detail))
    return found
