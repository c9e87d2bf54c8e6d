"""How early the zoo's models take the image in: what they answer when all visual tokens are dropped after a layer.

``python -m benchmarks.absorption`` measures and writes ``benchmarks/results/absorption.json``, with ``--table`` it puts
the committed numbers into docs/zoo.md. A model takes in early what is answered although nothing of the image is left
behind its first layers; a stage that stands later than that proves nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import trio
from lab.training.card import filled
from lab.training.evaluate import accuracy, any_size
from trio import zoo
from trio.adapters import adapter_for
from trio.measure.calibration.curve import drop_all_spec
from trio.measure.shapesvqa.examples import Example, examples
from trio.measure.statistics import Bootstrap, Estimate

RESULT = Path(__file__).parent / "results" / "absorption.json"
PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
#: Alike but for how early they take the image in.
NAMES = ("tiny-llava", "tiny-llava-early", "tiny-llava-late")
console = Console()


def percent(asked: list[Example], right: list[bool]) -> Estimate:
    """Share of questions answered right, with its interval over scenes."""
    return Bootstrap([one.scene for one in asked], one_by_one=True).number([float(hit) for hit in right])


def measure(model: Any, processor: Any, asked: list[Example]) -> dict[str, list[float]]:
    """Accuracy by the number of layers behind which all visual tokens are dropped; under ``full`` with all of them."""
    found = {"full": percent(asked, accuracy(model, processor, asked))}
    for layer in range(len(adapter_for(model).layers)):
        pipeline = trio.Pipeline.from_spec(drop_all_spec(layer), model)
        found[str(layer)] = percent(asked, accuracy(model, processor, asked, context=pipeline))
        console.print(f"  none after {layer}: {found[str(layer)].mean:.3f}")
    return {name: [round(value, 4) for value in (one.mean, one.low, one.high)] for name, one in found.items()}


def taken_in(curve: dict[str, list[float]]) -> list[float]:
    """By layer, the share of what the image gives that is left when the image is dropped behind it: 0 at the input."""
    full, blind = curve["full"][0], curve["0"][0]
    return [(curve[name][0] - blind) / (full - blind) for name in curve if name != "full"]


def table(results: dict[str, Any]) -> str:
    """The curves as Markdown: a line a model, by the share of its layers that have run."""
    deepest = max(len(taken_in(one["curve"])) for one in results["models"].values())
    lines = [
        f"{results['scenes']} scenes of the split `{results['split']}`; percent of what the image gives (full minus "
        "everything dropped at the input) that is",
        "still answered when all visual tokens are dropped after so many layers. `python -m benchmarks.absorption`",
        "",
        "| model | layers | full | " + " | ".join(f"after {n}" for n in range(deepest)) + " |",
        "| --- | ---: | ---: | " + " | ".join("---:" for _ in range(deepest)) + " |",
    ]
    for name, one in results["models"].items():
        shares = taken_in(one["curve"])
        cells = [f"{100 * share:.0f}" for share in shares] + [""] * (deepest - len(shares))
        lines.append(f"| `{name}` | {len(shares)} | {100 * one['curve']['full'][0]:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Zoo models, or folders of models; default: those of the page.")
    ] = None,
    scenes: Annotated[int, typer.Option(help="Scenes.")] = 40,
    split: Annotated[str, typer.Option(help="Of ShapesVQA.")] = "validation",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    as_table: Annotated[bool, typer.Option("--table", help="Fill the page from the committed results.")] = False,
) -> None:
    """Measure, or fill the page."""
    if as_table:
        results = json.loads(RESULT.read_text())
        PAGE.write_text(filled(PAGE.read_text(), {"absorption": table(results)}))
        return
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    for name in names or NAMES:
        folder = Path(name) if Path(name).is_dir() else zoo.path(name)
        console.print(name)
        model, processor = zoo.load_folder(folder)
        asked = examples(split, 0, scenes, varied=any_size(model))  # type: ignore[arg-type]  # a name from outside
        found[folder.name] = {"curve": measure(model, processor, asked), "questions": len(asked)}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    content = {"split": split, "scenes": scenes, "versions": versions, "models": found}
    console.print(table(content))
    if not names:
        RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
