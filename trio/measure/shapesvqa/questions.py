"""Questions about drawn scenes, with balanced answers.

A blind guesser should gain nothing: within a type, an ``Asker`` always asks the question whose answer it has heard
least so far. Questions about a colour or a number that is not there exist, too. What a question is about is
given as indices of items, so that an oracle can keep the visual tokens of just these.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, HELD_OUT, PLATES, SHAPES, Item, Scene

COUNTS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the items of the scene that one must see to know.

    Attributes:
        kind: The type, one of ``KINDS``.
        text: The question in words.
        answer: The expected answer.
        about: Indices of the items asked about; empty where nothing in the image matches.
        detail: Finer type: for existence, how hard the negative is.
        group: Answers are balanced within a group, so that no word of the question gives the answer away.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()
    detail: str = ""
    group: str = ""


def plural(shape: str) -> str:
    """``circle`` to ``circles``, ``cross`` to ``crosses``."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _with(scene: Scene, shape: str | None = None, colour: str | None = None) -> tuple[int, ...]:
    items = scene.items
    return tuple(
        i
        for i in scene.shapes
        if (shape is None or items[i].shape == shape) and (colour is None or items[i].colour == colour)
    )


def _names(scene: Scene, index: int) -> list[str]:
    """Shortest descriptions that fit this shape and no other in the scene."""
    item = scene.items[index]
    names = []
    if len(_with(scene, shape=item.shape)) == 1:
        names.append(f"the {item.shape}")
    if len(_with(scene, colour=item.colour)) == 1:
        names.append(f"the {item.colour} shape")
    if not names and len(_with(scene, item.shape, item.colour)) == 1:
        names.append(f"the {item.colour} {item.shape}")
    return names


def _existence(scene: Scene, rng: random.Random) -> list[Question]:
    shapes, colours = {scene.items[i].shape for i in scene.shapes}, {scene.items[i].colour for i in scene.shapes}
    yes = [(c, s, "") for c, s in sorted({(scene.items[i].colour, scene.items[i].shape) for i in scene.shapes})]
    no: dict[str, list[tuple[str, str, str]]] = {"random": [], "popular": [], "adversarial": []}
    for colour in COLOURS:
        for shape in SHAPES:
            if _with(scene, shape, colour) or (scene.split != "novel" and (colour, shape) in HELD_OUT):
                continue
            level = ("random", "popular", "adversarial")[(colour in colours) + (shape in shapes)]
            no[level].append((colour, shape, level))
    negatives = no[rng.choice([level for level in no if no[level]])]
    found = []
    for colour, shape, level in (rng.choice(yes), rng.choice(negatives)):
        about = _with(scene, shape, colour) or _with(scene, shape=shape) + _with(scene, colour=colour)
        article = "an" if colour == "orange" else "a"
        found.append(
            Question("existence", f"is there {article} {colour} {shape}?", "no" if level else "yes", about, level)
        )
    return found


def _colour(scene: Scene, rng: random.Random) -> list[Question]:
    if rng.random() < 1 / (len(COLOURS) + 1):
        absent = [s for s in SHAPES if not _with(scene, shape=s)]
        return [Question("colour", f"what colour is the {s}?", "none") for s in absent]
    found = [_with(scene, shape=s) for s in SHAPES]
    return [
        Question("colour", f"what colour is the {scene.items[i[0]].shape}?", scene.items[i[0]].colour, i)
        for i in found
        if len(i) == 1
    ]


def _shape(scene: Scene, rng: random.Random) -> list[Question]:
    if rng.random() < 1 / (len(SHAPES) + 1):
        absent = [c for c in COLOURS if not _with(scene, colour=c)]
        return [Question("shape", f"what is the {c} shape?", "none") for c in absent]
    found = [_with(scene, colour=c) for c in COLOURS]
    return [
        Question("shape", f"what is the {scene.items[i[0]].colour} shape?", scene.items[i[0]].shape, i)
        for i in found
        if len(i) == 1
    ]


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    wanted = [(_with(scene, shape=s), plural(s)) for s in SHAPES] + [
        (_with(scene, colour=c), f"{c} shapes") for c in COLOURS
    ]
    return [
        Question("count", f"how many {name} are there?", COUNTS[len(i)], i, group=name)
        for i, name in wanted
        if len(i) < len(COUNTS)
    ]


def side(item: Item, other: Item) -> str | None:
    """On which side of ``other`` an item is; None where it is oblique."""
    dx, dy = item.centre[0] - other.centre[0], item.centre[1] - other.centre[1]
    if abs(dx) > 1.6 * abs(dy):
        return "right" if dx > 0 else "left"
    if abs(dy) > 1.6 * abs(dx):
        return "below" if dy > 0 else "above"
    return None


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    names = {i: _names(scene, i) for i in scene.shapes}
    for i, ours in names.items():
        for j, theirs in names.items():
            if i == j or not ours or not theirs:
                continue
            where = side(scene.items[i], scene.items[j])
            if where:
                text = f"on which side of {rng.choice(theirs)} is {rng.choice(ours)}?"
                found.append(Question("relation", text, where, (i, j)))
    return found


def _corner(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for i in scene.shapes:
        where, names = scene.corner(i), _names(scene, i)
        if where and names:
            found.append(Question("corner", f"in which corner is {rng.choice(names)}?", where, (i,)))
    return found


def _number(scene: Scene, rng: random.Random) -> list[Question]:
    plates = {scene.items[i].colour: i for i in scene.plates}
    if rng.random() < 0.12:
        absent = [
            Question("number", f"what number is on the {c} plate?", "none") for c in sorted(PLATES) if c not in plates
        ]
        return absent if plates or not absent else [*absent, Question("number", "what is the number?", "none")]
    found = [
        Question("number", f"what number is on the {c} plate?", str(scene.items[i].number), (i,))
        for c, i in plates.items()
    ]
    if len(plates) == 1:
        index = next(iter(plates.values()))
        found.append(Question("number", "what is the number?", str(scene.items[index].number), (index,)))
    return found


def _same(scene: Scene, rng: random.Random) -> list[Question]:
    """Two steps: find the first shape, then the other one of its colour."""
    found, others_wanted = [], int(rng.random() > 1 / (len(SHAPES) + 1))
    for i in scene.shapes:
        item = scene.items[i]
        others = tuple(j for j in _with(scene, colour=item.colour) if j != i)
        if len(_with(scene, shape=item.shape)) == 1 and len(others) == others_wanted:
            answer = scene.items[others[0]].shape if others else "none"
            found.append(
                Question("same", f"which other shape has the colour of the {item.shape}?", answer, (i, *others))
            )
    return found


KINDS: dict[str, Callable[[Scene, random.Random], list[Question]]] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "corner": _corner,
    "number": _number,
    "same": _same,
}
"""The types of question; each gives the questions that fit a scene."""


class Asker:
    """Asks so that, within a type, every answer comes up about equally often."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self._heard: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in KINDS}

    def ask(self, scene: Scene, kind: str, rng: random.Random) -> Question | None:
        """A question of this type about the scene; None where none fits."""
        options = KINDS[kind](scene, rng)
        if not options:
            return None
        heard = self._heard[kind]
        rng.shuffle(options)
        best = min(options, key=lambda q: heard[q.group, q.answer])
        heard[best.group, best.answer] += 1
        return best


def centre_patch(item: Item, patch: int) -> tuple[int, int]:
    """Row and column of the patch in the middle of an item."""
    return int(item.centre[1]) // patch, int(item.centre[0]) // patch


def dense_questions(scene: Scene, rng: random.Random, patch: int) -> list[Question]:
    """Exercises for training only: what is where, and where is what, in rows and columns of patches."""

    def at(index: int) -> str:
        row, col = centre_patch(scene.items[index], patch)
        return f"r{row} c{col}"

    def phrase(index: int) -> str:
        item = scene.items[index]
        return f"{item.colour} plate {item.number}" if item.shape == "plate" else f"{item.colour} {item.shape}"

    order = sorted(scene.shapes, key=lambda i: centre_patch(scene.items[i], patch))
    found = [Question("dense", "describe", " ".join(f"{phrase(i)} {at(i)}" for i in order))]
    cover = scene.coverage(patch)
    taken = np.argwhere(cover.max(0) > 0.5)
    for _ in range(3):
        row, col = (int(v) for v in taken[rng.randrange(len(taken))])
        found.append(Question("dense", f"what is at r{row} c{col}?", phrase(int(cover[:, row, col].argmax()))))
    empty = np.argwhere(cover.sum(0) == 0)
    if len(empty):
        row, col = (int(v) for v in empty[rng.randrange(len(empty))])
        found.append(Question("dense", f"what is at r{row} c{col}?", "none"))
    for i in scene.shapes:
        for name in _names(scene, i):
            found.append(Question("dense", f"where is {name}?", at(i)))
    for i in scene.plates:
        found.append(Question("dense", f"where is the {scene.items[i].colour} plate?", at(i)))
    for i in range(len(scene.items)):
        where = scene.corner(i)
        if where:
            found.append(Question("dense", f"what is in the {where} corner?", phrase(i)))
    return found
