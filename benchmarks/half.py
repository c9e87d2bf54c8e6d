"""How many of the same tokens a batch keeps as its samples do alone in bfloat16, where ties break within rounding.

``python -m benchmarks.half`` writes ``benchmarks/results/half-tiny-llava.json``; ``python -m benchmarks.measured`` puts
it into docs/testing.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import trio
from benchmarks.evaluate import PAPER, SHARES, two_stages
from trio import zoo
from trio.core.images import batch_for
from trio.measure.evaluation import LabelledSample, shapesvqa
from trio.measure.shapesvqa.task import canvas_for
from trio.spec import load_spec
from trio.spec.schedule import resolve

RESULT = Path(__file__).parent / "results" / "half-tiny-llava.json"
NAME = "tiny-llava"
BATCH = 4
#: What stands at each stage in place of the default's parts.
PARTS: dict[str, Mapping[str, Any]] = {
    "the default's parts": {},
    "nms in place of soft-nms": {"selector": "nms"},
    "nms, and the paper's rows": PAPER,
}
console = Console()


def shapes(tokens: int, layers: int) -> dict[str, list[dict[str, Any]]]:
    """The default's stages at 11%, and the first of them alone, with counts of an image of so many tokens."""
    stages = two_stages()
    spec = load_spec({"version": 1, "stages": stages, "budget": {"average": SHARES["11"]}})
    both = [
        {**stage, "keep": count}
        for stage, count in zip(stages, resolve(spec, layers).stage_counts(tokens), strict=True)
    ]
    return {"one stage": both[:1], "two stages": both}


def one_of_each(model: Any, scenes: int) -> list[LabelledSample]:
    """A question about each of the first scenes, of different sub-tasks, and so of different lengths."""
    task = shapesvqa(limit=scenes, canvas=canvas_for(model))
    asked = [[s for s in task.samples if s.scene == scene] for scene in range(scenes)]
    return [of_scene[number % len(of_scene)] for number, of_scene in enumerate(asked)]


def chosen(model: Any, processor: Any, pipeline: trio.Pipeline, samples: Sequence[LabelledSample]) -> list[set[int]]:
    """The tokens that each sample has left."""
    inputs = batch_for(processor, [([one.load()], one.question) for one in samples])
    with pipeline, torch.no_grad():
        model(**inputs.to(dtype=model.dtype))
    return [set(images[0]) for images in pipeline.report.selection()[-1]]


def main(
    scenes: Annotated[int, typer.Option(help="Scenes of the test split; each gives one question.")] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure and write the result."""
    torch.set_num_threads(threads)
    model, processor = zoo.load(NAME, dtype=torch.bfloat16)
    samples = one_of_each(model, scenes)
    rows = []
    for shape, stages in shapes(144, 8).items():
        for what, parts in PARTS.items():
            pipeline = trio.Pipeline(model, stages=[{**stage, **parts} for stage in stages], positions="original")
            same = total = 0
            for first in range(0, scenes, BATCH):
                batch = samples[first : first + BATCH]
                for one, kept in zip(batch, chosen(model, processor, pipeline, batch), strict=True):
                    (alone,) = chosen(model, processor, pipeline, [one])
                    same, total = same + len(alone & kept), total + len(alone)
            rows.append({"stages": shape, "parts": what, "same": same, "tokens": total})
            console.print(rows[-1])
    versions = {"trio-vlm": trio.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = {"model": NAME, "dtype": "bfloat16", "images": scenes, "batch": BATCH, "versions": versions, "rows": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(found: Mapping[str, Any]) -> Table:
    """The result as the page shows it."""
    rows = found["rows"]
    made = Table(title=f"{found['images']} images, batches of {found['batch']}, {found['model']}, {found['dtype']}")
    shapes_ = list(dict.fromkeys(row["stages"] for row in rows))
    for heading in ("same tokens, batches against singles", *shapes_):
        made.add_column(heading, justify="left" if heading not in shapes_ else "right")
    for what in dict.fromkeys(row["parts"] for row in rows):
        of_parts = {row["stages"]: row["same"] / row["tokens"] for row in rows if row["parts"] == what}
        made.add_row(what, *(f"{of_parts[shape]:.1%}" for shape in shapes_))
    return made


if __name__ == "__main__":
    typer.run(main)
