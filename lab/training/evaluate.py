"""How well a model of the zoo answers on held-out scenes: ``python -m lab.training.evaluate tiny-llava``.

The same questions are asked with the image and with a blank one: what a model scores without the image it owes to
the questions, not to its eyes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from trio import zoo
from trio.core.upstream import MASK, Role, cache_of, keywords
from trio.measure.answering import decode, generate
from trio.measure.shapesvqa.examples import Example, examples
from trio.measure.statistics import Bootstrap, Estimate, proportion


def any_size(model: Any) -> bool:
    """Whether a model was trained on images of many sizes; all of the zoo but the LLaVA-1.5 one."""
    return bool(model.config.model_type != "llava")


def blank(asked: Sequence[Example]) -> list[Example]:
    """The same questions about a grey image."""
    return [
        Example(
            Image.new("RGB", e.image.size, (128, 128, 128)), e.question, e.answer, e.kind, e.scene, e.boxes, e.detail
        )
        for e in asked
    ]


def prompt(processor: Any, question: str) -> str:
    """The question in the model's chat format, with a placeholder for one image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    )


def answers(
    model: Any,
    processor: Any,
    asked: Sequence[Example],
    batch_size: int = 32,
    context: AbstractContextManager[Any] | None = None,
    max_new_tokens: int = 6,
) -> list[str]:
    """Greedy answers of a model, through its own ``generate``, in left-padded batches.

    Args:
        model: The model.
        processor: Its processor.
        asked: The questions.
        batch_size: Questions in a batch.
        context: Entered for the whole run; a pipeline, to see how the compressed model answers.
        max_new_tokens: Longest answer.
    """
    found: list[str] = []
    with context or nullcontext():
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            inputs = processor(
                images=[e.image for e in part],
                text=[prompt(processor, e.question) for e in part],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device, model.dtype)
            found += decode(processor, generate(model, inputs, max_new_tokens=max_new_tokens))
    return found


def _same_image(one: Example, other: Example) -> bool:
    return one.scene == other.scene and one.image == other.image


def answers_by_scene(model: Any, processor: Any, asked: Sequence[Example], max_new_tokens: int = 6) -> list[str]:
    """As ``answers``, several times faster: every image is read once, and its cache serves all questions about it.

    For models whose positions count tokens (all of the LLaVA family), without a pipeline.
    """
    found: list[str] = []
    image, start, pad = processor.image_token_id, 0, processor.tokenizer.pad_token_id
    while start < len(asked):
        first = asked[start]
        end = next((i for i in range(start, len(asked)) if not _same_image(asked[i], first)), len(asked))
        part = asked[start:end]
        inputs = processor(images=first.image, text=prompt(processor, first.question), return_tensors="pt")
        ids = inputs["input_ids"][0]
        length = int((ids == image).nonzero()[-1]) + 1
        texts = [prompt(processor, e.question).split(processor.image_token)[-1] for e in part]
        rest = processor.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left")
        tails = torch.tensor(rest["input_ids"])
        full = torch.cat([ids[:length].expand(len(part), -1), tails], 1)
        mask = torch.cat([torch.ones(len(part), length, dtype=torch.long), (tails != pad).long()], 1)
        images = {k: v for k, v in inputs.items() if k not in ("input_ids", MASK)}
        with torch.no_grad():
            asked_for = {Role.IDS: ids[None, :length], Role.USE_CACHE: True, Role.LOGITS_TO_KEEP: 1}
            cache = cache_of(model(**keywords(asked_for), **images))
            cache.batch_repeat_interleave(len(part))
        given = keywords({Role.IDS: full, Role.MASK: mask, Role.CACHE: cache})
        found += decode(processor, generate(model, given, max_new_tokens=max_new_tokens))
        start = end
    return found


def accuracy(
    model: Any,
    processor: Any,
    asked: Sequence[Example],
    batch_size: int = 32,
    context: AbstractContextManager[Any] | None = None,
) -> list[bool]:
    """Whether each question was answered right; arguments as for ``answers``."""
    given = answers(model, processor, asked, batch_size, context)
    return [text == example.answer for text, example in zip(given, asked, strict=True)]


def _right(model: Any, processor: Any, asked: Sequence[Example], batch_size: int) -> list[bool]:
    if not model.config.model_type.startswith("llava"):  # M-RoPE counts an image's rows, not its tokens
        return accuracy(model, processor, asked, batch_size)
    given = answers_by_scene(model, processor, asked)
    return [text == example.answer for text, example in zip(given, asked, strict=True)]


def summary(asked: Sequence[Example], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Accuracy, interval and number of questions, by type and overall.

    A type has one question a scene, so its interval is Wilson's; the overall one comes from a bootstrap over scenes.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(e.kind for e in asked):
        hits = [r for e, r in zip(asked, right, strict=True) if e.kind == kind]
        table[kind] = _row(proportion(sum(hits), len(hits)), len(hits))
    draws = Bootstrap([e.scene for e in asked], one_by_one=True)
    table["overall"] = _row(draws.number([float(one) for one in right]), len(right))
    return table


def _row(found: Estimate, questions: int) -> dict[str, float]:
    return {"accuracy": found.mean, "low": found.low, "high": found.high, "questions": questions}


def main(
    name: Annotated[str, typer.Argument(help="A model of the zoo, or the folder of one.")] = "tiny-llava",
    scenes: Annotated[int, typer.Option(help="Number of held-out scenes.")] = 400,
    split: Annotated[str, typer.Option(help="test, validation or novel.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON to this file, too.")] = None,
) -> None:
    """Accuracy by type of question, with the image and with a blank one."""
    if split not in ("test", "validation", "novel"):
        raise typer.BadParameter(f"--split is test, validation or novel, not {split!r}")
    folder = Path(name) if Path(name).is_dir() else zoo.path(name)
    model, processor = zoo.load_folder(folder)
    varied = any_size(model)
    asked = examples(split, seed, scenes, varied=varied)  # type: ignore[arg-type]
    full, unseen = (summary(asked, _right(model, processor, part, batch_size)) for part in (asked, blank(asked)))

    content = {"model": folder.name, "split": split, "seed": seed, "scenes": scenes, "varied": varied}
    text = json.dumps(content | {"full": full, "blank": unseen}, indent=2)
    if out is not None:
        out.write_text(text + "\n")
    if as_json:
        typer.echo(text)
        return
    table = Table(title=f"{folder.name}: {scenes} scenes of the split {split}, seed {seed}")
    for column in ("type", "n", "full", "95%", "blank", "95%", "sees"):
        table.add_column(column, justify="left" if column == "type" else "right", no_wrap=True)
    for kind, row in full.items():
        other = unseen[kind]
        spans = [f"{100 * r['low']:.1f}-{100 * r['high']:.1f}" for r in (row, other)]
        gain = 100 * (row["low"] - other["accuracy"])
        cells = (f"{100 * row['accuracy']:.1f}", spans[0], f"{100 * other['accuracy']:.1f}", spans[1], f"{gain:+.1f}")
        table.add_row(kind, f"{row['questions']:.0f}", *cells)
    console = Console()
    console.print(table)
    console.print("full: with the image; blank: with a grey one; sees: lower end of full minus blank, in points")


if __name__ == "__main__":
    typer.run(main)
