"""What bfloat16 changes, where ties break within rounding: kept tokens, and answers, against those of the stock model.

First, how many of the same tokens a batch keeps as its samples do alone. Second, how many answers differ between
bfloat16 and float32 weights, of the full model and with specs: half precision moves answers of the stock model too, and
a spec is held against that.

``python -m benchmarks.half`` writes ``benchmarks/results/half-tiny-llava.json``; ``python -m benchmarks.measured`` puts
it into docs/testing.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import trio
from benchmarks.evaluate import PAPER, RELEASED, SHARES, three_stages, two_stages
from trio import zoo
from trio.core.images import batch_for
from trio.measure.answering import GreedyAnswerer
from trio.measure.evaluation import LabelledSample, shapesvqa
from trio.measure.shapesvqa.task import MAX_NEW_TOKENS, canvas_for
from trio.measure.statistics import Bootstrap, Estimate
from trio.spec import load_spec
from trio.spec.schedule import resolve

RESULT = Path(__file__).parent / "results" / "half-tiny-llava.json"
NAME = "tiny-llava"
BATCH = 4
#: Questions in a batch where answers are compared: the same batches in both formats.
ASKED = 32
SPECS: dict[str, Any] = {
    **{f"trio-soft (ours), {share}%": f"trio-soft-{share}" for share in SHARES},
    "TRIO (released), 11%": {
        "version": 1,
        "stages": three_stages(**RELEASED),
        "positions": "auto",
        "budget": {"average": SHARES["11"]},
    },
    "divprune, 11%": {"version": 1, "compressor": {"name": "divprune", "keep": SHARES["11"]}},
}
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
    task = shapesvqa(limit=scenes, canvas=canvas_for(model))
    rows = _tokens(model, processor, one_of_each(model, scenes))
    answers = changed_answers(processor, task.samples)
    versions = {"trio-vlm": trio.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = {
        "model": NAME,
        "dtype": "bfloat16",
        "images": scenes,
        "batch": BATCH,
        "versions": versions,
        "rows": rows,
        "answers": answers,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(table(found), answer_table(found))


def _tokens(model: Any, processor: Any, samples: Sequence[LabelledSample]) -> list[dict[str, Any]]:
    """Tokens that batches and singles keep alike, for each shape and choice of parts; batches are padded."""
    rows = []
    for shape, stages in shapes(144, 8).items():
        for what, parts in PARTS.items():
            pipeline = trio.Pipeline(model, stages=[{**stage, **parts} for stage in stages], positions="original")
            same = total = 0
            for first in range(0, len(samples), BATCH):
                batch = samples[first : first + BATCH]
                for one, kept in zip(batch, chosen(model, processor, pipeline, batch), strict=True):
                    (alone,) = chosen(model, processor, pipeline, [one])
                    same, total = same + len(alone & kept), total + len(alone)
            rows.append({"stages": shape, "parts": what, "same": same, "tokens": total})
            console.print(rows[-1])
    return rows


def answered(dtype: torch.dtype, spec: Any, processor: Any, samples: Sequence[LabelledSample]) -> list[str]:
    """The answers of the model with weights of a dtype; `spec` None asks the full model."""
    model, _ = zoo.load(NAME, dtype=dtype)
    pipeline = None if spec is None else trio.Pipeline.from_spec(spec, model)
    answerer = GreedyAnswerer(model, processor, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[str] = []
    for first in range(0, len(samples), ASKED):
        batch = samples[first : first + ASKED]
        texts += answerer(answerer.inputs([([one.load()], one.question) for one in batch]), pipeline).texts
    return texts


def changed_answers(processor: Any, samples: Sequence[LabelledSample]) -> list[dict[str, Any]]:
    """For the full model and each spec: percent of answers that differ, and by how much more than the full model's."""
    bootstrap = Bootstrap([one.scene for one in samples])
    every = np.ones(len(samples), bool)
    rows: list[dict[str, Any]] = []
    stock = np.zeros(len(samples))
    for name, spec in {"full model": None, **SPECS}.items():
        low, high = (answered(dtype, spec, processor, samples) for dtype in (torch.bfloat16, torch.float32))
        differs = 100.0 * np.array([one != other for one, other in zip(low, high, strict=True)])
        if spec is None:
            stock = differs
        row = {"name": name, "questions": len(samples), "differ": bootstrap.number(differs).model_dump()}
        if spec is not None:
            row["more"] = bootstrap.difference(differs, stock, every).model_dump()
        rows.append(row)
        console.print(row)
    return rows


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


def answer_table(found: Mapping[str, Any]) -> Table:
    """How many answers differ between the two formats."""
    rows = found["answers"]
    made = Table(
        title=f"{rows[0]['questions']} questions, {found['model']}: answers in {found['dtype']} and in float32"
    )
    for heading in ("", "percent that differ", "more than the full model's"):
        made.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        more = Estimate(**row["more"]).signed() if "more" in row else ""
        made.add_row(row["name"], str(Estimate(**row["differ"])), more)
    return made


if __name__ == "__main__":
    typer.run(main)
