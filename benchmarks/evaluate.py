"""All shipped methods on a model of the zoo at 33, 22 and 11% of its visual tokens, and what the default is made of.

``python -m benchmarks.evaluate tiny-llava`` writes ``benchmarks/results/eval-tiny-llava.json``; with ``--parts`` the
default's own parts are varied instead, on the split ``validation``, which is for choosing. It is `trio eval` with a
list of specs; answers are kept under ``runs/``, so that a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from trio import zoo
from trio.evaluation import evaluate, shapesvqa
from trio.evaluation.shapes import canvas_for

RESULTS = Path(__file__).parent / "results"
SHARES = {"33": "33.3%", "22": "22.2%", "11": "11.1%"}
DEPTHS: tuple[Any, ...] = ("3.2%", "31.3%", "46.9%")  # of the shipped spec trio-11
#: The tower of the small models has too few blocks for scan's published ones.
SCAN = {"name": "scan", "window": 4, "local_layer": 1, "global_layer": -2}
console = Console()


PUBLISHED = {"name": "nms", "threshold": 0.8}


def three_stages(scorer: Any = "objective-gradient", selector: Any = "soft-nms") -> list[dict[str, Any]]:
    """Stages at the depths and ratios of `trio-11`, for a budget; the default's parts."""
    keeps: tuple[Any, ...] = ("auto", {"share": "58.7%", "of": "current"}, {"share": "40.7%", "of": "current"})
    return [
        {"after_layer": depth, "keep": keep, "scorer": scorer, "selector": selector}
        for depth, keep in zip(DEPTHS, keeps, strict=True)
    ]


def at_budget(name: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """A spec for each share."""
    for label, share in SHARES.items():
        yield {"version": 1, "name": f"{name}, {label}%", **fields, "budget": {"average": share}}


def methods() -> Iterator[dict[str, Any]]:
    """Every shipped method; the default comes first, so that the others of its budget are compared with it."""
    yield from at_budget("TRIO", stages=three_stages())
    yield from at_budget("TRIO with nms, as published", stages=three_stages(selector=PUBLISHED))
    yield from at_budget("gradient + top-k", stages=three_stages(selector="top-k"))
    for name, selector in (("TRIO at the input", "soft-nms"), ("TRIO with nms at the input", PUBLISHED)):
        for label, share in SHARES.items():
            stage = {"after_layer": 0, "keep": share, "selector": selector}
            yield {"version": 1, "name": f"{name}, {label}%", "stages": [stage], "budget": {"average": share}}
    for name, compressor in (
        ("visionzip", {"name": "visionzip"}),
        ("scan", SCAN),
        ("vispruner", {"name": "vispruner"}),
        ("divprune", {"name": "divprune"}),
        ("average-pool", {"name": "average-pool"}),
        ("uniform-grid", {"name": "uniform-grid"}),
    ):
        for label, share in SHARES.items():
            budget = {"average": share}
            yield {
                "version": 1,
                "name": f"{name}, {label}%",
                "compressor": {**compressor, "keep": share},
                "budget": budget,
            }
    for name, compressor in (("visionzip + TRIO", {"name": "visionzip"}), ("scan + TRIO", SCAN)):
        for label, share in SHARES.items():
            average = float(share.rstrip("%"))
            yield {
                "version": 1,
                "name": f"{name}, {label}%",
                # the published shape: three times as many behind the encoder as after half of the layers
                "compressor": {**compressor, "keep": f"{1.5 * average:.2f}%"},
                "stages": [{"after_layer": "50%", "keep": f"{average / 2:.2f}%"}],
                "budget": {"average": share},
            }
    for label, share in (("33", "23.8%"), ("22", "11.1%")):  # after one of eight layers no share averages 11%
        attention = {"after_layer": 1, "keep": share, "scorer": "last-token-attention", "selector": "top-k"}
        yield {"version": 1, "name": f"last-token-attention, {label}%", "stages": [attention]}


#: What the slower models are asked with; the controls of every schedule take most of the time.
BRIEF = (
    "TRIO",
    "TRIO with nms, as published",
    "gradient + top-k",
    "TRIO at the input",
    "visionzip",
    "divprune",
    "uniform-grid",
    "visionzip + TRIO",
)


def parts() -> Iterator[dict[str, Any]]:
    """The default with one part varied."""
    yield from at_budget("TRIO", stages=three_stages())
    released = {"name": "objective-gradient", "rows": "released"}
    yield from at_budget("rows as released", stages=three_stages(released))
    one = {"name": "objective-gradient", "positions": 1}
    yield from at_budget("1 row", stages=three_stages(one))
    for weight in (0.0, 0.1, 0.5):
        selector: dict[str, Any] = {"name": "soft-nms", "weight": weight}
        yield from at_budget(f"soft-nms, weight {weight}", stages=three_stages(selector=selector))
    for threshold in (0.7, 0.8, 0.9):
        yield from at_budget(f"nms, {threshold}", stages=three_stages(selector={"name": "nms", "threshold": threshold}))
    selector = {"name": "nms", "threshold": 0.8, "centre": True}
    yield from at_budget("nms, centred", stages=three_stages(selector=selector))
    yield from at_budget("nms, quantile 0.9", stages=three_stages(selector={"name": "nms", "quantile": 0.9}))


def main(
    name: Annotated[str, typer.Argument(help="Zoo model.")],
    scenes: Annotated[int, typer.Option(help="Scenes.")] = 150,
    varied: Annotated[bool, typer.Option("--parts", help="Vary the default's parts, on the validation split.")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="Only the methods that matter most.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
    speed_rounds: Annotated[int, typer.Option(help="Rounds of measuring times; 0: none.")] = 0,
) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(threads)
    model, processor = zoo.load(name)
    task = shapesvqa("validation" if varied else "test", limit=scenes, canvas=canvas_for(model))
    specs = list(parts() if varied else methods())
    specs = [spec for spec in specs if not brief or spec["name"].rpartition(",")[0] in BRIEF]
    if varied and "original" in _positions(model):
        specs += [
            {**spec, "name": f"original positions, {spec['name'][6:]}", "positions": "original"} for spec in specs[:3]
        ]
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
            speed_rounds=speed_rounds,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
        )
    (RESULTS / f"{kind}-{name}.json").write_text(results.to_json() + "\n")


def _positions(model: Any) -> frozenset[str]:
    """Numberings that are not the model's default already."""
    from trio.adapters import adapter_for

    adapter = adapter_for(model)
    return frozenset(adapter.allowed_positions - {adapter.default_positions})


if __name__ == "__main__":
    typer.run(main)
