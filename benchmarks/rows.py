"""The rows of the retention table: where tokens are dropped, how many are kept, and by which method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import trio
from trio.evaluation.floors import UniformGrid
from trio.schedule import resolve

SHARES = ("33.3%", "22.2%", "11.1%")
SEEDS = range(5)
Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class Placement:
    """Where the stages stand.

    Attributes:
        name: in the results.
        title: in the table.
        text: a sentence about it.
        depths: `after_layer` of the stages.
        average: whether a share is the average over the layers (else: what is left after the one stage).
    """

    name: str
    title: str
    text: str
    depths: tuple[int | str, ...]
    average: bool = False

    def pipeline(self, model: Any, share: str, scorer: Any, selector: str) -> trio.Pipeline:
        """A pipeline of one method at this place."""
        keeps: list[Any] = ["auto", {"share": "58.7%", "of": "current"}, {"share": "40.7%", "of": "current"}]
        if not self.average:
            keeps = [share]
        stages = [
            {"after_layer": depth, "keep": keep, "scorer": scorer, "selector": selector}
            for depth, keep in zip(self.depths, keeps, strict=True)
        ]
        return trio.Pipeline(model, stages=stages, budget={"average": share} if self.average else None)


PLACEMENTS = (
    Placement(
        "input",
        "One stage at the input",
        "All layers run on the kept tokens alone (`after_layer: 0`): nothing that was dropped has reached the text.",
        (0,),
    ),
    Placement(
        "trio-11",
        "Three stages at the depths of `trio-11`",
        "The shipped spec's shares of the depth and its ratios between stages, with other budgets. On 8 layers they "
        "stand after layers 0, 2 and 3. The share is the average over the layers.",
        ("3.2%", "31.3%", "46.9%"),
        average=True,
    ),
    Placement(
        "after-1",
        "One stage after the first layer",
        "The earliest place where `last-token-attention` works. One layer has already carried visual information into "
        "the text. The share is what is left after the stage; the average over the layers is higher, since the first "
        "layer runs on all tokens.",
        (1,),
    ),
)


@dataclass(frozen=True)
class Method:
    """A scorer with a selector, and in how many draws it comes."""

    name: str
    scorer: Any
    selector: str


METHODS = (
    Method("objective-gradient + nms", "objective-gradient", "nms"),
    Method("objective-gradient + top-k", "objective-gradient", "top-k"),
    Method("last-token-attention + top-k", "last-token-attention", "top-k"),
    Method("uniform grid", UniformGrid(), "top-k"),
)


@dataclass(frozen=True)
class Row:
    """One pipeline to measure; `pipeline` is None for the model as it is."""

    name: str
    average: float
    pipeline: trio.Pipeline | None = None
    blank: bool = False


def rows(model: Any, tokens: int) -> tuple[list[Row], dict[str, str]]:
    """Every row, and the refused combinations with the reason that the package gives.

    Args:
        model: the model.
        tokens: visual tokens that it has for a picture.
    """
    found = [Row("full", tokens), Row("blank", tokens, blank=True)]
    refused: dict[str, str] = {}
    for depth in range(len(model.model.language_model.layers)):
        nothing = trio.Pipeline(
            model, stages=[{"after_layer": depth, "keep": 0, "scorer": "random", "selector": "top-k"}]
        )
        found.append(Row(f"none/{depth}", _average(nothing, tokens), nothing))
    for name, placement, share, scorer, selector in _combinations():
        try:
            pipeline = placement.pipeline(model, share, scorer, selector)
        except trio.UnsupportedModelError as error:
            refused[name] = str(error)
        else:
            found.append(Row(name, _average(pipeline, tokens), pipeline))
    return found, refused


def _combinations() -> Iterator[tuple[str, Placement, str, Any, str]]:
    for placement in PLACEMENTS:
        for share in SHARES:
            for method in METHODS:
                yield key(placement, share, method.name), placement, share, method.scorer, method.selector
            for seed in SEEDS:
                scorer = {"name": "random", "seed": seed}
                yield key(placement, share, f"random {seed}"), placement, share, scorer, "top-k"


def key(placement: Placement, share: str, method: str) -> str:
    """Name of a row in the results."""
    return f"{placement.name}/{share}/{method}"


def _average(pipeline: trio.Pipeline, tokens: int) -> float:
    return resolve(pipeline.spec, len(pipeline.adapter.layers)).average(tokens)
