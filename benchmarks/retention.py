"""What a model still answers with fewer visual tokens.

``python -m benchmarks.retention tiny-llava --scenes 300`` measures, ``python -m benchmarks.retention --table`` writes
``docs/retention.md`` from the committed results. Every row is asked the same questions about the same held-out scenes.
Scenes come in chunks, and a chunk is written when all rows have answered it: a killed run goes on where it was, and a
larger ``--scenes`` adds to what is there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress

import trio
from benchmarks.rows import Row, rows
from benchmarks.table import with_summary, write_table
from trio import zoo
from trio.adapters import adapter_for
from trio.evaluation.runner import remembered
from trio.zoo.evaluate import Example, any_size, blank, examples, prompt

RESULTS = Path(__file__).parent / "results"
CHUNK = 25  # scenes
SEED = 2026  # of the scenes; the zoo's own evaluation uses 0
console = Console()


@dataclass
class Batch:
    """Questions, ready for the model.

    Attributes:
        inputs: what `generate` takes.
        answers: the expected ones.
        seen: what the vision tower gave for the pictures, call by call, once it has.
    """

    inputs: Any
    answers: list[str]
    seen: list[Any] = field(default_factory=list)


def batches(processor: Any, asked: Sequence[Example], batch_size: int) -> list[Batch]:
    """Left-padded batches."""
    made = []
    for first in range(0, len(asked), batch_size):
        part = asked[first : first + batch_size]
        inputs = processor(
            images=[e.image for e in part],
            text=[prompt(processor, e.question) for e in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        made.append(Batch(inputs, [e.answer for e in part]))
    return made


def answered(model: Any, processor: Any, row: Row, asked: Sequence[Batch]) -> str:
    """Which questions a row answers right, one character each: "1" or "0"."""
    right = ""
    tower = adapter_for(model).vision_tower
    with row.pipeline or nullcontext(), torch.no_grad():
        for batch in asked:
            with remembered(tower, batch.seen):
                out = model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
            texts = processor.batch_decode(out[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += "".join("01"[text.strip() == answer] for text, answer in zip(texts, batch.answers, strict=True))
    return right


def measure(
    name: str, folder: Path, out: Path, scenes: int, *, seed: int = SEED, batch_size: int = 64, limit: int | None = None
) -> None:
    """Runs every row on every chunk that is not there yet.

    Args:
        name: of the model, for the results.
        folder: of the model.
        out: the results, JSON.
        scenes: how many in all.
        seed: of the scenes.
        batch_size: questions in a batch.
        limit: chunks to run now; all that are missing by default.
    """
    model, processor = zoo.load_folder(folder)
    every = examples("test", seed, scenes, varied=any_size(model))
    tokens = _tokens(model, processor, every)
    table, refused = rows(model, tokens)
    header = {
        "model": name,
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "split": "test",
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "visual_tokens": tokens,
        **({"varied": True} if any_size(model) else {}),
        "layers": len(model.model.language_model.layers),
        "average": {row.name: row.average for row in table},
        "refused": refused,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trio-vlm": trio.__version__,
        },
    }
    results = _started(out, header)
    done = results["scenes"]
    todo = list(range(done, scenes, CHUNK))[:limit]
    with Progress(console=console) as progress:
        bar = progress.add_task(f"{name}: rows", total=len(todo) * len(table))
        for first in todo:
            begin = time.perf_counter()
            asked = [e for e in every if first <= e.scene < first + CHUNK]
            seeing, blind = (batches(processor, some, batch_size) for some in (asked, blank(asked)))
            for row in table:
                results["right"][row.name] = results["right"].get(row.name, "") + answered(
                    model, processor, row, blind if row.blank else seeing
                )
                progress.advance(bar)
            results["questions"]["scene"] += [e.scene for e in asked]
            results["questions"]["kind"] += [e.kind for e in asked]
            results["scenes"] = min(first + CHUNK, scenes)
            results["seconds"] = round(results["seconds"] + time.perf_counter() - begin, 1)
            _write(out, results)
    console.print(
        f"{results['scenes']} scenes, {len(results['questions']['kind'])} questions, {len(table)} rows: {out}"
    )


def measured() -> list[dict[str, Any]]:
    """The committed results, by the names of the models."""
    files = [json.loads(file.read_text()) for file in RESULTS.glob("retention-*.json")]
    return sorted(files, key=lambda results: str(results["model"]))


def _tokens(model: Any, processor: Any, every: Sequence[Example]) -> int:
    """Visual tokens of a picture, the mean over the first scenes where sizes vary."""
    pictures = {example.scene: example for example in every}
    some = [pictures[scene] for scene in sorted(pictures)[:CHUNK]]
    counts = []
    for example in some:
        inputs = processor(images=[example.image], text=[prompt(processor, example.question)], return_tensors="pt")
        given = {"image": inputs} if "image_sizes" in inputs else {}
        (images,) = adapter_for(model).layout(inputs["input_ids"], given).images
        counts.append(sum(int(image.is_picture.sum()) for image in images))
    return round(sum(counts) / len(counts))


def _started(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones."""
    if not out.exists():
        return {**header, "scenes": 0, "seconds": 0.0, "questions": {"scene": [], "kind": []}, "right": {}}
    results: dict[str, Any] = json.loads(out.read_text())
    other = [field for field, value in header.items() if results.get(field) != value]
    if other:
        raise trio.InputError(
            f"{out}: it holds results with other {', '.join(other)}; going on would mix two measurements. Give another "
            "--out, or remove the file to start again."
        )
    return results


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out)


def main(
    name: Annotated[str, typer.Argument(help="A model of the zoo, or the folder of one.")] = "tiny-llava",
    scenes: Annotated[int, typer.Option(help="Held-out scenes, those of an earlier run counted in.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Results; default benchmarks/results/retention-NAME.json.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads; 1 where other work runs beside.")] = 2,
    table: Annotated[bool, typer.Option("--table", help="Only write docs/retention.md from the results.")] = False,
) -> None:
    """Accuracy by retention, method and place."""
    if table:
        root = Path(__file__).parent.parent
        files = measured()
        write_table(files, root / "docs" / "retention.md")
        readme = root / "README.md"
        readme.write_text(with_summary(readme.read_text(), files[0]))
        console.print("wrote docs/retention.md and the table in README.md")
        return
    torch.set_num_threads(threads)
    folder = Path(name) if Path(name).is_dir() else zoo.path(name)
    measure(folder.name, folder, out or RESULTS / f"retention-{folder.name}.json", scenes, batch_size=batch_size)


if __name__ == "__main__":
    typer.run(main)
