"""Where dropping visual tokens hurts: descriptions, second questions on a kept cache, counting, two images.

``python -m benchmarks.slices tiny-llava`` writes ``benchmarks/results/slices-tiny-llava.json``; answers are kept under
``runs/``, so that a stopped run goes on. ``python -m benchmarks.slices --table`` puts all results into
docs/where-it-hurts.md.
"""

from __future__ import annotations

import functools
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from PIL import Image
from rich.console import Console

import trio
from benchmarks.evaluate import RELEASED, SHARES, three_stages
from benchmarks.tables import table_head, table_row, write_block
from trio import zoo
from trio.core.images import batch_for, prompt_for
from trio.core.upstream import Role, cache_of, keywords
from trio.errors import TrioError
from trio.measure.answering import GREEDY, GreedyAnswerer, decode
from trio.measure.shapesvqa.slices import (
    MAX_NEW_TOKENS,
    SLICES,
    SliceName,
    SliceSample,
    named_right,
    slice_samples,
)
from trio.measure.shapesvqa.task import canvas_for
from trio.measure.statistics import Bootstrap, Estimate
from trio.spec import load_spec

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "where-it-hurts.md"
FULL, DEFAULT = "full", "trio-soft (ours), 11%"
#: The score of a slice that the gate looks at, and that rows are compared with; ``right`` for the others.
JUDGED: Mapping[SliceName, str] = {"describe": "objects", "second-question": "on the kept cache"}
SHARE = SHARES["11"]
#: Specs by the name of their row; those that do not read the question say so.
SPECS: dict[str, Any] = {
    DEFAULT: "trio-soft-11",
    "trio-soft (ours), 33%": "trio-soft-33",
    "TRIO (released), 11%": {
        "version": 1,
        "stages": three_stages(**RELEASED),
        "positions": "auto",
        "budget": {"average": SHARE},
    },
    "visionzip, 11% (question-blind)": {"version": 1, "compressor": {"name": "visionzip", "keep": SHARE}},
    "divprune, 11% (question-blind)": {"version": 1, "compressor": {"name": "divprune", "keep": SHARE}},
    "random, 11%": {
        "version": 1,
        "stages": [{"after_layer": 0, "keep": SHARE, "scorer": "random", "selector": "top-k"}],
    },
}
#: A slice counts where the full model has that many percent, and that many points more than without an image.
GATE, ABOVE_BLANK = 90.0, 30.0
GREY = (128, 128, 128)
BATCH = 20
console = Console()


class SliceAsker:
    """Asks a model the samples of a slice."""

    def __init__(self, name: str, folder: Path) -> None:
        """Loads a model of the zoo; answers are kept in the folder."""
        self.model, self.processor = zoo.load(name)
        self.canvas = canvas_for(self.model)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, what: str, samples: Sequence[SliceSample], spec: Any, ask: Callable[[], list[str]]) -> list[str]:
        """Answers that an earlier run has written, or those that are given now.

        Args:
            what: is asked, and how.
            samples: that are asked.
            spec: of the row; None: the full model.
            ask: gives the answers.
        """
        asked = [[turn.question for turn in one.turns] for one in samples]
        mark = hashlib.sha256(json.dumps([what, asked, spec, _written(spec)]).encode()).hexdigest()[:12]
        file = self._folder / f"{what}-{mark}.json"
        if file.exists():
            stored: list[str] = json.loads(file.read_text(encoding="utf-8"))
            return stored
        answers = ask()
        file.write_text(json.dumps(answers), encoding="utf-8")
        return answers

    def last_turns(
        self, name: SliceName, samples: Sequence[SliceSample], spec: Any, *, blank: bool = False
    ) -> list[str]:
        """Answers to the last question of each sample, asked by itself.

        Args:
            name: of the slice.
            samples: of it.
            spec: of the row; None: the full model.
            blank: grey images in place of the sample's own.
        """
        answerer = GreedyAnswerer(self.model, self.processor, max_new_tokens=MAX_NEW_TOKENS[name])
        pipeline = None if spec is None else trio.Pipeline.from_spec(spec, self.model)
        texts: list[str] = []
        for first in range(0, len(samples), BATCH):
            batch = samples[first : first + BATCH]
            images = [[_grey(image) if blank else image for image in one.images] for one in batch]
            prompts = [(some, one.turns[-1].question) for some, one in zip(images, batch, strict=True)]
            texts += answerer(answerer.inputs(prompts), pipeline).texts
        return texts

    def second_turns(self, samples: Sequence[SliceSample], spec: Any) -> list[str]:
        """Answers to the second question on the cache of the first one and of what the model answered to it."""
        pipeline = None if spec is None else trio.Pipeline.from_spec(spec, self.model)
        if pipeline is None:
            return [self._second(one) for one in samples]
        with pipeline:
            return [self._second(one) for one in samples]

    def _second(self, sample: SliceSample) -> str:
        first, second = sample.turns
        longest = MAX_NEW_TOKENS["second-question"]
        inputs = batch_for(self.processor, [(sample.images, first.question)])
        text = prompt_for(self.processor, 0, second.question)
        more = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = self.model.generate(**inputs, **GREEDY, max_new_tokens=longest, return_dict_in_generate=True)
            conversation = torch.cat([out.sequences, more], 1)
            given = {Role.IDS: conversation, Role.MASK: torch.ones_like(conversation), Role.CACHE: cache_of(out)}
            answer = self.model.generate(**keywords(given), **GREEDY, max_new_tokens=longest)
        return decode(self.processor, answer[:, conversation.shape[1] :])[0]


def _written(spec: Any) -> Any:
    """What a shipped spec says, so that answers of an older one are not taken for its own."""
    return None if spec is None else load_spec(spec).to_dict()


def _grey(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, GREY)


def measured_slice(asker: SliceAsker, name: SliceName, count: int) -> dict[str, Any]:
    """Everything of one slice, with intervals over samples."""
    samples = slice_samples(name, count, canvas=asker.canvas)
    draws = Bootstrap(range(count))
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    own: dict[str, dict[str, np.ndarray]] = {}
    judged = JUDGED.get(name, "right")
    blank = asker.kept(f"{name}-blank", samples, None, lambda: asker.last_turns(name, samples, None, blank=True))
    for row, spec in {FULL: None, **SPECS}.items():
        try:
            afresh = asker.kept(name, samples, spec, functools.partial(asker.last_turns, name, samples, spec))
            found = scores(name, samples, afresh)
            if name == "second-question":
                turns = asker.kept(f"{name}-cache", samples, spec, functools.partial(asker.second_turns, samples, spec))
                found["on the kept cache"] = scores(name, samples, turns)["right"]
        except TrioError as error:
            refused[row] = str(error)
            continue
        own[row] = found
        compared: dict[str, np.ndarray] = {}
        if name == "second-question":
            compared["kept cache above asked afresh"] = found[judged] - found["right"]
        for base in (FULL, DEFAULT):
            if base in own and row not in (FULL, base):
                compared[f"{judged}, above {base}"] = found[judged] - own[base][judged]
        numbers = {what: draws.mean(one) for what, one in found.items()}
        numbers |= {what: draws.number(one) for what, one in compared.items()}
        if name == "second-question":
            numbers["of those that full has right there"] = draws.mean(found[judged], own[FULL][judged] > 0)
        percent = {what: one.scaled(100, 2) for what, one in numbers.items()}
        rows.append({"name": row, "scores": {what: one.model_dump() for what, one in percent.items()}})
        console.print(f"{name}, {row}: " + ", ".join(f"{what} {one.mean:.1f}" for what, one in percent.items()))
    nothing = scores(name, samples, blank)
    full, without = (100 * float(one.mean()) for one in (own[FULL][judged], nothing.get(judged, nothing["right"])))
    return {
        "questions": count,
        "gate": {"full": full, "no image": without, "passed": full >= GATE and full - without >= ABOVE_BLANK},
        "rows": rows,
        "refused": refused,
    }


def scores(name: SliceName, samples: Sequence[SliceSample], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether the last answers are right, 0 or 1 each; of a description also the share of objects named right."""
    last = [one.turns[-1] for one in samples]
    found = {"right": np.array([turn.is_right(text) for turn, text in zip(last, answers, strict=True)], float)}
    if name == "describe":
        shares = [named_right(text, turn.answers[0]) for turn, text in zip(last, answers, strict=True)]
        found["objects"] = np.array(shares)
    return found


# The page


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The measured part of the page."""
    return "\n".join(line for found in results for line in _model(found))


def _model(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {found['model']}\n"
    for name, part in found["slices"].items():
        gate = part["gate"]
        columns = list(dict.fromkeys(what for row in part["rows"] for what in row["scores"]))
        turns, judged = "on the kept cache" in columns, JUDGED.get(name, "right")
        shares = f"{judged}, full {gate['full']:.0f}%, no image {gate['no image']:.0f}%"
        failed = "only rows against each other, in the last column" if turns else "nothing follows from its rows"
        verdict = "passes the gate" if gate["passed"] else f"**fails the gate**: {failed}"
        yield f"**{name}**, {part['questions']} questions ({shares}): {verdict}.\n"
        yield table_head(["", *("asked afresh" if turns and what == "right" else what for what in columns)])
        for row in part["rows"]:
            yield table_row([row["name"], *(_cell(what, row["scores"].get(what)) for what in columns)])
        yield from (f"\n{row}: not measured ({why})" for row, why in part["refused"].items())
        yield ""


def _cell(what: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    estimate = Estimate(**value)
    return estimate.signed() if "above" in what else str(estimate)


def marks() -> tuple[str, str]:
    """The lines before and after the measured part of the page."""
    return "<!-- measured: python -m benchmarks.slices --table -->", "<!-- end of what was measured -->"


def measured() -> list[dict[str, Any]]:
    """The committed results, by model."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("slices-*.json"))]


def block() -> str:
    """The measured part of the page, with the lines that mark it."""
    begin, end = marks()
    found = measured()
    return "\n".join([begin, "", *findings(found), "", page(found), end])


def findings(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the numbers say of the most dangerous case and of long answers, a line a model."""

    def mean(found: Mapping[str, Any], name: str, row: str, what: str) -> str:
        rows = {one["name"]: one["scores"] for one in found["slices"][name]["rows"]}
        return f"{rows[row][what]['mean']:.0f}"

    cache, afresh, there = "on the kept cache", "right", "of those that full has right there"
    third, blind, released = "trio-soft (ours), 33%", "divprune, 11% (question-blind)", "TRIO (released), 11%"
    for found in results:
        second, long = functools.partial(mean, found, "second-question"), functools.partial(mean, found, "describe")
        said = (
            f"- **{found['model']}**, a second question: full has {second(FULL, afresh)}% asked afresh and "
            f"{second(FULL, cache)}% on the kept cache. With tokens dropped for the first question, there: "
            f"{second(DEFAULT, cache)}% at 11% kept ({second(DEFAULT, afresh)}% afresh), {second(third, cache)}% at "
            f"33% ({second(third, afresh)}%). Of those that full has right there: {second(DEFAULT, there)}% at 11%; "
            f"{second(blind, there)}% with DivPrune, which does not look at the question.",
            f"Objects named right in a description: full {long(FULL, 'objects')}%, {long(third, 'objects')}% at 33%, "
            f"{long(DEFAULT, 'objects')}% at 11%; {long(released, 'objects')}% with TRIO as released, "
            f"{long('random, 11%', 'objects')}% with random tokens.",
        )
        yield textwrap.fill(" ".join(said), 118, subsequent_indent="  ")


def main(
    name: Annotated[str, typer.Argument(help="Zoo model.")] = "tiny-llava",
    scenes: Annotated[int, typer.Option(min=2, help="Questions of each slice.")] = 60,
    table: Annotated[bool, typer.Option("--table", help="Write the page from the results; measure nothing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Measure and write the results file, or the page."""
    if table:
        write_block(PAGE, block())
        return
    torch.set_num_threads(threads)
    asker = SliceAsker(name, ROOT / "runs" / f"slices-{name}")
    found = {
        "model": name,
        "scenes": scenes,
        "versions": {
            "trio-vlm": trio.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "slices": {one: measured_slice(asker, one, scenes) for one in SLICES},
    }
    (RESULTS / f"slices-{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
