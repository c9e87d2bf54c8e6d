"""ShapesVQA: questions about drawn scenes, in sub-tasks named after what they stand for.

A versioned, seeded data set with fixed splits on the zoo's scenes, drawn when needed. It shows that code works and
how methods compare on small models that were trained on such scenes; it ranks nothing else. `docs/shapesvqa.md` says
what is done against answers that need no looking, or no reading of the question; a test asserts each of it.

Existence comes with negatives of three kinds after POPE (arXiv 2305.10355), attributes, relations and counts after GQA
(arXiv 1902.09506), reading after TextVQA (arXiv 1904.08920); ``same`` takes two steps.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Literal

from ...errors import InputError
from ..evaluation.task import LabelledSample, Task
from .questions import KINDS, Question
from .scenes import COLOURS, HELD_OUT, SHAPES, Scene, Split, draw_scene
from .views import varied_scene

__all__ = ["CANVASES", "SPLITS", "SUBTASKS", "VERSION", "canvas_for", "drawn_scenes", "fits", "reveals", "shapesvqa"]

VERSION = 1
#: Scenes of each split. ``test`` is reported, ``validation`` is for choosing, ``novel`` has what training never saw.
SPLITS = {"test": 2000, "validation": 500, "novel": 500}
SEED = 1905
#: Sub-tasks in the order in which a scene is asked; those that could give others away come before them.
LEVELS = ("random", "popular", "adversarial")
SUBTASKS = (
    "colour",
    "shape",
    "relation",
    "corner",
    "number",
    "same",
    *(f"existence-{level}" for level in LEVELS),
    "count",
)
Canvas = Literal["square", "varied"]
#: ``square``: 168 x 168 pixels; ``varied``: about 100 to 336 pixels wide and high, aspect ratios from 2:5 to 5:2.
CANVASES: tuple[Canvas, ...] = ("square", "varied")
MAX_NEW_TOKENS = 6
#: Share of the patches that things touch in every scene, at least.
FOREGROUND = 1 / 3
#: Scenes that `trio eval` asks about where none are named.
DEFAULT_LIMIT = 150


def canvas_for(model: Any) -> Canvas:
    """The canvas that a model of the zoo was trained on; for other models ``varied``."""
    return "square" if model.config.model_type == "llava" else "varied"


def shapesvqa(
    split: Literal["test", "validation", "novel"] = "test",
    *,
    limit: int | None = None,
    canvas: Canvas = "square",
    seed: int = SEED,
) -> Task:
    """The data set, or its first scenes.

    Args:
        split: ``test``, ``validation`` or ``novel``.
        limit: scenes, at most the size of the split (`SPLITS`).
        canvas: sizes of the images, see `CANVASES`.
        seed: other seeds give other scenes of the same kind; results name the seed.

    Raises:
        InputError: there is no such split or canvas, or it has fewer scenes.
    """
    for name, value, known in (("split", split, tuple(SPLITS)), ("canvas", canvas, CANVASES)):
        if value not in known:
            raise InputError(f"shapesvqa: {name} {value!r} is unknown; allowed: {', '.join(known)}.")
    scenes = SPLITS[split] if limit is None else limit
    if not 0 < scenes <= SPLITS[split]:
        raise InputError(
            f"shapesvqa: limit {scenes}: the split {split!r} has {SPLITS[split]} scenes; give 1 to {SPLITS[split]}."
        )
    asker, samples = _Asker(), []
    for index, scene in enumerate(islice(drawn_scenes(split, canvas, seed), scenes)):
        for kind, question in asker.ask(scene, seed):
            sample = LabelledSample(
                scene.image, question.text, (question.answer,), kind, index, scene.item_map, tuple(question.about)
            )
            samples.append(sample)
    facts = {"split": split, "canvas": canvas, "seed": seed, "scenes": scenes}
    return Task("shapesvqa", VERSION, tuple(samples), MAX_NEW_TOKENS, facts)


def drawn_scenes(split: Split, canvas: Canvas, seed: int = SEED) -> Iterator[Scene]:
    """The scenes of a split in their order, without end: those whose things touch a third of the patches or more.

    That is three times a budget of 11%: else a scorer that finds the foreground could win without the question.
    """
    for index in count():
        scene = varied_scene(split, seed, index) if canvas == "varied" else draw_scene(split, seed, index)
        if foreground(scene) >= FOREGROUND:
            yield scene


def foreground(scene: Scene) -> float:
    """Share of the patches of 14 x 14 pixels of which things cover more than a fifth."""
    return float((scene.coverage().sum(0) > 0.2).mean())


class _Asker:
    """Asks at most one question of each sub-task about a scene, that whose answer was asked for least so far."""

    def __init__(self) -> None:
        self._heard: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in SUBTASKS}

    def ask(self, scene: Scene, seed: int) -> list[tuple[str, Question]]:
        asked: list[tuple[str, Question]] = []
        for kind in SUBTASKS:
            rng = random.Random(f"shapesvqa/{VERSION}/{scene.split}/{seed}/{scene.index}/{kind}")
            options = [q for q in self._options(scene, kind, rng) if fits(q, [other for _, other in asked])]
            if not options:
                continue
            heard = self._heard[kind]
            rng.shuffle(options)
            best = min(options, key=lambda q: (heard[q.group, q.answer], heard["", q.answer]))
            heard[best.group, best.answer] += 1
            if best.group:
                heard["", best.answer] += 1
            asked.append((kind, best))
        return asked

    def _options(self, scene: Scene, kind: str, rng: random.Random) -> list[Question]:
        if not kind.startswith("existence-"):
            return KINDS[kind](scene, rng)
        heard = self._heard[kind]
        ahead = heard["", "yes"] - heard["", "no"]
        return [
            q
            for q in _existence(scene, kind.removeprefix("existence-"))
            if (1 if q.answer == "yes" else -1) * ahead <= 0
        ]


def _existence(scene: Scene, level: str) -> list[Question]:
    """Pairs in the scene, and pairs that are not there, as near to being there as the level says.

    ``random``: neither colour nor shape is in the image; ``popular``: one of them is; ``adversarial``: both are, on
    different things.
    """
    pairs = {(scene.items[i].colour, scene.items[i].shape) for i in scene.shapes}
    colours, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
    found = []
    for colour in COLOURS:
        for shape in SHAPES:
            there = (colour, shape) in pairs
            if not there and (colour, shape) in HELD_OUT and scene.split != "novel":
                continue  # no training question mentions it
            if not there and LEVELS[(colour in colours) + (shape in shapes)] != level:
                continue
            about = tuple(
                i
                for i in scene.shapes
                if (
                    (scene.items[i].colour, scene.items[i].shape) == (colour, shape)
                    if there
                    else scene.items[i].colour == colour or scene.items[i].shape == shape
                )
            )
            article = "an" if colour == "orange" else "a"
            text = f"is there {article} {colour} {shape}?"
            found.append(Question("existence", text, "yes" if there else "no", about, "" if there else level))
    return found


def fits(question: Question, asked: Sequence[Question]) -> bool:
    """Whether the question is new, and neither gives away another's answer nor has its own given away."""
    return not any(
        other.text == question.text or reveals(other.text, question) or reveals(question.text, other) for other in asked
    )


def reveals(text: str, question: Question) -> bool:
    """Whether the wording of one question gives away the answer to another about the same scene.

    "The red circle" says that there is one, so it answers "is there a red circle?", "what colour is the circle?" and
    "what is the red shape?"; "the circle" says how many circles there are.
    """
    named = re.findall(r"the (?:(\w+) )?(\w+)", text)
    pairs = {(colour, shape) for colour, shape in named if colour in COLOURS and shape in SHAPES}
    alone = {word for colour, shape in named for word in (colour, shape) if word in COLOURS or word in SHAPES}
    words = question.text.rstrip("?").split()
    if question.kind == "existence":
        return (words[-2], words[-1]) in pairs
    if question.kind == "colour":
        return (question.answer, words[-1]) in pairs
    if question.kind == "shape":
        return (words[-2], question.answer) in pairs
    if question.kind == "count":
        noun = words[2]
        return any(noun in (word, f"{word}s", f"{word}es") for word in alone)
    return False
