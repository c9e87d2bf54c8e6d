"""Slices of ShapesVQA where dropping visual tokens hurts: what is asked needs more than one region, or another one.

- ``describe``: all objects in reading order with their places, in one long answer.
- ``second-question``: two questions about different objects of one image, asked one after the other.
- ``counting``: zero to nine things of one shape.
- ``two-images``: which of two images has a thing.

The zoo's models were trained on the questions of the first two only: the others are for checkpoints of one's own.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

from PIL import Image

from ...errors import InputError
from ..evaluation.task import LabelledSample, Task, normalise
from .questions import COUNTS, KINDS, Question, dense_questions, plural
from .scenes import COLOURS, HELD_OUT, PLATES, SHAPES, Scene, Split, draw_things
from .task import CANVASES, SEED, Canvas, drawn_scenes, fits

__all__ = ["SLICES", "TASKS", "SliceName", "SliceSample", "SliceTurn", "named_right", "slice_samples", "slice_task"]

VERSION = 1
SliceName = Literal["describe", "second-question", "counting", "two-images"]
SLICES: tuple[SliceName, ...] = get_args(SliceName)
#: Slices of one question about one image: those that `trio eval` can ask.
TASKS: tuple[SliceName, ...] = ("describe", "counting")
#: Side of a visual token of the zoo's models, in pixels: the unit of the places in descriptions.
UNIT = 14
NUMBERS = (*COUNTS, "four", "five", "six", "seven", "eight", "nine")
#: Longest answer, in tokens.
MAX_NEW_TOKENS: dict[SliceName, int] = {"describe": 48, "second-question": 6, "counting": 6, "two-images": 6}
#: Sub-tasks of which a second question is asked: those whose questions are about certain things.
FOLLOWING = ("colour", "shape", "number", "corner", "relation", "same")
#: Scenes for counting: nine cells or more.
COUNTED_SIZE: dict[Canvas, tuple[int, int]] = {"square": (168, 168), "varied": (224, 224)}
CELL = 56


@dataclass(frozen=True)
class SliceTurn:
    """A question.

    Attributes:
        question: in words.
        answers: those that count as right.
        kind: sub-task.
        about: numbers of the things of the (last) scene that one must see to answer.
    """

    question: str
    answers: tuple[str, ...]
    kind: str
    about: tuple[int, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether an answer is one of `answers`, up to `normalise`."""
        return normalise(answer) in {normalise(one) for one in self.answers}


@dataclass(frozen=True)
class SliceSample:
    """A conversation about one image or two.

    Attributes:
        scenes: what is in the images.
        turns: the questions, in order.
        number: of the sample.
    """

    scenes: tuple[Scene, ...] = field(repr=False)
    turns: tuple[SliceTurn, ...]
    number: int

    @property
    def images(self) -> list[Image.Image]:
        """The images, in order."""
        return [scene.image for scene in self.scenes]


def slice_samples(
    name: SliceName, count: int, *, canvas: Canvas = "square", split: Split = "test", seed: int = SEED
) -> list[SliceSample]:
    """The first samples of a slice.

    Args:
        name: one of `SLICES`.
        count: how many.
        canvas: sizes of the images.
        split: of the scenes.
        seed: of the scenes.

    Raises:
        InputError: there is no such slice or canvas, or `count` is not positive.
    """
    for what, value, known in (("slice", name, SLICES), ("canvas", canvas, CANVASES)):
        if value not in known:
            raise InputError(f"shapesvqa: {what} {value!r} is unknown; allowed: {', '.join(known)}.")
    if count < 1:
        raise InputError(f"shapesvqa: found {count} samples of a slice; give 1 or more.")
    made: dict[SliceName, Iterator[SliceSample]] = {
        "describe": _descriptions(split, canvas, seed),
        "second-question": _conversations(split, canvas, seed),
        "counting": _counted(split, canvas, seed),
        "two-images": _pairs(split, canvas, seed),
    }
    return list(islice(made[name], count))


def slice_task(
    name: SliceName, count: int, *, canvas: Canvas = "square", split: Split = "test", seed: int = SEED
) -> Task:
    """A slice of one question about one image as a task for `evaluate`; a description is right as a whole.

    Args:
        name: one of `TASKS`.
        count: scenes; others as for `slice_samples`.
        canvas: sizes of the images.
        split: of the scenes.
        seed: of the scenes.

    Raises:
        InputError: the slice has two turns or two images, or as `slice_samples`.
    """
    if name in SLICES and name not in TASKS:
        raise InputError(
            f"slice {name!r}: it has two turns or two images, which `trio eval` does not ask; use one of "
            f"{', '.join(TASKS)}, or `python -m benchmarks.slices` from the sources."
        )
    samples = tuple(
        LabelledSample(
            one.images[0], turn.question, turn.answers, turn.kind, one.number, one.scenes[0].item_map, turn.about
        )
        for one in slice_samples(name, count, canvas=canvas, split=split, seed=seed)
        for turn in one.turns
    )
    facts = {"slice": name, "split": split, "canvas": canvas, "seed": seed, "scenes": count}
    return Task("shapesvqa", VERSION, samples, MAX_NEW_TOKENS[name], facts)


def named_right(answer: str, truth: str) -> float:
    """Share of the objects of a description that are named right, colour and shape (or plate and number).

    Places are not looked at. Objects that are named too often or do not exist count against it: the share is of the
    longer of the two lists.

    Args:
        answer: the description.
        truth: the right one.
    """
    said, there = Counter(_objects(answer)), Counter(_objects(truth))
    return (said & there).total() / max(said.total(), there.total(), 1)


def _objects(description: str) -> list[str]:
    """The objects of a description, in order: ``red circle`` or ``black plate 42``."""
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    return re.findall(rf"\b(?:(?:{colours}) (?:{shapes})|(?:{'|'.join(PLATES)}) plate \d\d)\b", description.casefold())


def _descriptions(split: Split, canvas: Canvas, seed: int) -> Iterator[SliceSample]:
    for number, scene in enumerate(drawn_scenes(split, canvas, seed)):
        described = dense_questions(scene, random.Random(0), UNIT)[0]
        turn = SliceTurn(described.text, (described.answer,), "describe", tuple(scene.shapes))
        yield SliceSample((scene,), (turn,), number)


def _conversations(split: Split, canvas: Canvas, seed: int) -> Iterator[SliceSample]:
    """One conversation a scene; a scene with no two questions about different things is left out."""
    heard: Counter[tuple[str, str]] = Counter()
    number = 0
    for scene in drawn_scenes(split, canvas, seed):
        rng = random.Random(f"shapesvqa-turns/{VERSION}/{split}/{seed}/{scene.index}")
        questions = [q for kind in FOLLOWING for q in KINDS[kind](scene, rng) if q.about]
        pairs = [(one, two) for one in questions for two in questions if _elsewhere(one, two)]
        if not pairs:
            continue
        rng.shuffle(pairs)
        one, two = min(pairs, key=lambda pair: (heard["", pair[1].kind], heard[pair[1].kind, pair[1].answer]))
        heard["", two.kind] += 1
        heard[two.kind, two.answer] += 1
        turns = tuple(SliceTurn(q.text, (q.answer,), q.kind, tuple(q.about)) for q in (one, two))
        yield SliceSample((scene,), turns, number)
        number += 1


def _elsewhere(one: Question, two: Question) -> bool:
    """Whether two questions are about different things, and neither gives the other's answer away."""
    return not set(one.about) & set(two.about) and fits(two, [one])


def _counted(split: Split, canvas: Canvas, seed: int) -> Iterator[SliceSample]:
    """Scenes with zero to nine things of one shape, in turn, and six to nine things in all."""
    number = 0
    while True:
        rng = random.Random(f"shapesvqa-counting/{VERSION}/{split}/{seed}/{number}")
        wanted, shape = number % len(NUMBERS), rng.choice(SHAPES)
        others = [one for one in SHAPES if one != shape]
        shapes = [shape] * wanted + [rng.choice(others) for _ in range(rng.randint(max(0, 6 - wanted), 9 - wanted))]
        rng.shuffle(shapes)
        things = [(rng.choice(_colours_of(one, split)), one) for one in shapes]
        scene = draw_things(rng, things, split, number, COUNTED_SIZE[canvas], CELL)
        about = tuple(i for i, item in enumerate(scene.items) if item.shape == shape)
        turn = SliceTurn(
            f"how many {plural(shape)} are there?", (NUMBERS[wanted], str(wanted)), f"count-{wanted}", about
        )
        yield SliceSample((scene,), (turn,), number)
        number += 1


def _colours_of(shape: str, split: Split) -> Sequence[str]:
    return [colour for colour in COLOURS if split == "novel" or (colour, shape) not in HELD_OUT]


def _pairs(split: Split, canvas: Canvas, seed: int) -> Iterator[SliceSample]:
    """Scenes two by two; what is asked for is in one of them, in the first as often as in the second.

    Where there is a choice, the other image has the colour and the shape too, on different things.
    """
    scenes, number = drawn_scenes(split, canvas, seed), 0
    for first, second in zip(scenes, scenes, strict=False):
        rng = random.Random(f"shapesvqa-pairs/{VERSION}/{split}/{seed}/{number}")
        at = number % 2
        there, other = (first, second) if at == 0 else (second, first)
        others = _named(other)
        options = sorted(_named(there) - others)
        if not options:
            continue
        colours, shapes = {colour for colour, _ in others}, {shape for _, shape in others}
        rng.shuffle(options)
        colour, shape = max(options, key=lambda one: (one[0] in colours) + (one[1] in shapes))
        about = tuple(
            i for i in second.shapes if at == 1 and (second.items[i].colour, second.items[i].shape) == (colour, shape)
        )
        article = "an" if colour == "orange" else "a"
        word = ("first", "second")[at]
        answers = (word, f"{word} image", f"{word} one", str(at + 1), f"image {at + 1}")
        turn = SliceTurn(f"which of the two images has {article} {colour} {shape}?", answers, "which-image", about)
        yield SliceSample((first, second), (turn,), number)
        number += 1


def _named(scene: Scene) -> set[tuple[str, str]]:
    """Pairs of colour and shape in a scene."""
    return {(scene.items[i].colour, scene.items[i].shape) for i in scene.shapes}
