"""All shipped methods on a model of the zoo at 33, 22 and 11% of its visual tokens, and what the default is made of.

``python -m benchmarks.evaluate tiny-llava`` writes ``benchmarks/results/eval-tiny-llava.json``; the default and the
compressors alone are asked at 75 and 50%, too. With ``--parts`` the default's own parts are varied, on the split
``validation``, which is for choosing. It is `trio eval` with a list of specs; answers are kept under ``runs/``, so that
a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import trio
from benchmarks.choose import ENGINE
from trio import zoo
from trio.measure.evaluation import evaluate, shapesvqa
from trio.measure.shapesvqa.task import canvas_for

RESULTS = Path(__file__).parent / "results"
SHARES = {"33": "33.3%", "22": "22.2%", "11": "11.1%"}
#: With those at which at most half a point is to be lost.
ALL_SHARES = {"75": "75%", "50": "50%", **SHARES}
#: Rows as in the released code (for Qwen it also applies the layer that has just run once more) and in the paper.
RELEASED = {"scorer": "trio", "selector": "nms"}
PAPER = {"scorer": {"name": "trio", "rows": "prompt-end"}, "selector": "nms"}
#: The tower of the small models has too few blocks for scan's published ones.
SCAN = {"name": "scan", "window": 4, "local_layer": 1, "global_layer": -2}
COMPRESSORS: tuple[dict[str, Any], ...] = (
    {"name": "visionzip"},
    SCAN,
    {"name": "vispruner"},
    {"name": "prumerge"},
    {"name": "divprune"},
    {"name": "tome"},
    {"name": "average-pool"},
    {"name": "uniform-grid"},
)
#: Smaller images (pooled tokens where images have one size): the curve that methods are held against.
SIZES = (0.85, 0.75, 0.6, 0.5, 0.4, 0.33, 0.25)
#: Depths of the default's stages, and what they keep.
TWO: dict[str, Any] = {"3.2%": "auto", "50%": {"share": "60%", "of": "current"}}
#: The depths and ratios of `trio-11`: after layers 1, 10 and 15 of 32.
THREE: dict[str, Any] = {
    "3.2%": "auto",
    "31.3%": {"share": "58.7%", "of": "current"},
    "46.9%": {"share": "40.7%", "of": "current"},
}
console = Console()


def soft(*, weight: float = 0.25, spread: float = 0.7) -> dict[str, Any]:
    """The default's selector."""
    return {"name": "soft-nms", "weight": weight, "spread": spread}


def spread_once(keeps: dict[str, Any], *, selector: Any = None, **parts: Any) -> list[dict[str, Any]]:
    """Stages with the default's selector or another; a `soft-nms` has its spread over the image at the first alone."""
    chosen = selector or soft()
    later = {**chosen, "spread": 0.0} if isinstance(chosen, dict) and "spread" in chosen else chosen
    stages = _stages(keeps, parts)
    return [{**stage, "selector": later if number else chosen} for number, stage in enumerate(stages)]


def two_stages(**parts: Any) -> list[dict[str, Any]]:
    """The default: at the input, and after half of the layers 60% of those (the shape of `trio-soft-11`)."""
    return spread_once(TWO, **parts)


def three_stages(**parts: Any) -> list[dict[str, Any]]:
    """Stages at the depths and with the ratios of `trio-11`, for a budget."""
    return _stages(THREE, parts)


def _stages(keeps: dict[str, Any], parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"after_layer": depth, "keep": keep, **parts} for depth, keep in keeps.items()]


def at_budget(name: str, shares: dict[str, str] = SHARES, **fields: Any) -> Iterator[dict[str, Any]]:
    """A spec for each share."""
    for label, share in shares.items():
        yield {"version": 1, "name": f"{name}, {label}%", **fields, "budget": {"average": share}}


def at_input(name: str, **parts: Any) -> Iterator[dict[str, Any]]:
    """One stage in front of the first layer, for each share."""
    for label, share in SHARES.items():
        yield {"version": 1, "name": f"{name}, {label}%", "stages": [{"after_layer": 0, "keep": share, **parts}]}


def alone(compressor: dict[str, Any], shares: dict[str, str], **fields: Any) -> Iterator[dict[str, Any]]:
    """A compressor without a stage, for each share."""
    for label, share in shares.items():
        # prumerge decides its own count, by quartiles or, here, as a share of outliers with one token for the rest
        count = {"share": float(share[:-1]) / 100 - 0.005} if compressor["name"] == "prumerge" else {"keep": share}
        yield {"version": 1, "name": f"{compressor['name']}, {label}%", "compressor": {**compressor, **count}, **fields}


def methods() -> Iterator[dict[str, Any]]:
    """Every shipped method; the default comes first, so that the others of its budget are compared with it."""
    yield from at_budget("trio-soft (ours)", ALL_SHARES, stages=two_stages())
    yield from at_budget("TRIO (released)", stages=three_stages(**RELEASED), positions="auto")
    yield from at_budget("TRIO (paper)", stages=three_stages(**PAPER), positions="auto")
    yield from at_budget("trio-soft with nms", stages=two_stages(selector="nms"))
    yield from at_budget("trio-soft with top-k", stages=two_stages(selector="top-k"))
    yield from at_budget("diversity only", stages=two_stages(selector=soft(weight=0.0)))
    yield from at_budget("soft-nms, spread 0.0", stages=two_stages(selector=soft(spread=0.0)))
    yield from at_input("trio-soft at the input")
    yield from at_input("trio-soft with nms at the input", selector="nms")
    for label in ALL_SHARES:  # as it is served: numbered as the family numbers, without newlines
        shipped = trio.load_spec(f"{ENGINE}-{label}").to_dict()
        yield {**shipped, "name": f"{ENGINE}, {label}%"}
    for compressor in COMPRESSORS:
        yield from alone(compressor, ALL_SHARES)
    for compressor in ({"name": "visionzip"}, SCAN, {"name": "divprune"}):
        for label, share in SHARES.items():  # the compressor in place of the default's first stage
            yield {
                "version": 1,
                "name": f"{compressor['name']} + trio-soft, {label}%",
                "compressor": {**compressor, "keep": f"{1.25 * float(share.rstrip('%')):.2f}%"},
                "stages": two_stages()[1:],
            }
    for label, share in SHARES.items():  # as many tokens as the default has, behind a cheaper tower
        yield {
            "version": 1,
            "name": f"resize 60% + trio-soft, {label}%",
            "resize": "60%",
            "stages": two_stages(),
            "budget": {"average": f"{float(share.rstrip('%')) / 0.6:.1f}%"},
        }
    for label, share in (("33", "23.8%"), ("22", "11.1%")):  # after one of eight layers no share averages 11%
        for scorer in ("last-token-attention", "objective-gradient"):
            stage = {"after_layer": 1, "keep": share, "scorer": scorer, "selector": "top-k"}
            yield {"version": 1, "name": f"{scorer} + top-k after layer 1, {label}%", "stages": [stage]}


def parts() -> Iterator[dict[str, Any]]:
    """The default with one part varied."""
    yield from at_budget("trio-soft (ours)", stages=two_stages())
    for what, scorer in (
        ("last 4 rows", {"rows": "prompt-end", "positions": 4}),
        ("last 4 rows, as released", {"rows": "released", "positions": 4}),
        ("last row", {"rows": "prompt-end", "positions": 1}),
        ("8 rows after the image", {"positions": 8}),
        ("the question's own words", {"skip": 2}),  # "assistant :" comes behind them
    ):
        yield from at_budget(what, stages=two_stages(scorer={"name": "objective-gradient", **scorer}))
    for weight in (0.0, 0.1, 0.5, 1.0):
        yield from at_budget(f"soft-nms, weight {weight}", stages=two_stages(selector=soft(weight=weight)))
    for spread in (0.0, 0.35, 1.4):
        yield from at_budget(f"soft-nms, spread {spread}", stages=two_stages(selector=soft(spread=spread)))
    yield from at_budget("spread at both stages", stages=_stages(TWO, {"selector": soft()}))
    for threshold in (0.7, 0.8, 0.9):
        yield from at_budget(f"nms, {threshold}", stages=two_stages(selector={"name": "nms", "threshold": threshold}))
    selector: dict[str, Any] = {"name": "nms", "threshold": 0.8, "centre": True}
    yield from at_budget("nms, centred", stages=two_stages(selector=selector))
    yield from at_budget("three stages", stages=three_stages())
    yield from at_input("one stage, at the input")
    yield from at_budget("renumbered positions", stages=two_stages(), positions="compact")


def main(
    name: Annotated[str, typer.Argument(help="Zoo model.")],
    scenes: Annotated[int, typer.Option(help="Scenes.")] = 150,
    varied: Annotated[bool, typer.Option("--parts", help="Vary the default's parts, on the validation split.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
    speed_rounds: Annotated[int, typer.Option(help="Rounds of measuring times; 0: none.")] = 0,
) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(threads)
    model, processor = zoo.load(name)
    task = shapesvqa("validation" if varied else "test", limit=scenes, canvas=canvas_for(model))
    specs = list(parts() if varied else methods())
    specs = [spec for spec in specs if fits(spec, model)]
    kind = "parts" if varied else "eval"
    with Progress(console=console) as bar:
        job = bar.add_task(f"{name}, {len(specs)} specs")
        results = evaluate(
            model,
            processor,
            task,
            specs,
            out=Path("runs") / f"{kind}-{name}",
            name=name,
            batch_size=batch_size,
            sizes=SIZES,
            speed_rounds=speed_rounds,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
        )
    (RESULTS / f"{kind}-{name}.json").write_text(results.to_json() + "\n")


def fits(spec: dict[str, Any], model: Any) -> bool:
    """Whether the model has what a spec needs; a method that it cannot run is named."""
    try:
        trio.Pipeline.from_spec(spec, model)
    except trio.UnsupportedModelError as error:
        console.print(f"not applicable: {spec['name']}: {error}")
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
