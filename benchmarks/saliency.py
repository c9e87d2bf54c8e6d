"""What the layer-local saliency measures, and what suppression finds to suppress, on the zoo's trained models.

``python -m benchmarks.saliency tiny-llava`` measures, ``python -m benchmarks.saliency --table`` writes
``docs/saliency.md`` from the committed results.

At each depth, for each question: the layer-local saliency (of the default scorer, with the paper's four rows, and with
those of the released code), beside two references. The end-to-end gradient is that of the same loss at the paper's rows
after all layers. Leave one out is how far the log-probability of the full model's first answer token falls when the
token alone is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from torch.nn import functional as F

import trio
from lab.training.evaluate import any_size, prompt
from trio import zoo
from trio.adapters import adapter_for
from trio.core.ops import unit_length
from trio.measure.shapesvqa.examples import examples
from trio.measure.statistics import Estimate
from trio.selectors.nms import centred

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "saliency.md"
THRESHOLD = 0.8
ROWS = 4
#: The saliencies that are compared: label and parameters.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "after-picture": ("default", {}),
    "prompt-end": ("last 4 rows", {"rows": "prompt-end", "positions": ROWS}),
    "released": ("released rows", {"rows": "released", "positions": ROWS}),
}
BEST = 16  # tokens whose overlap is reported
DEPTHS = (0, 1, 2, 4)
LEFT_OUT = (0, 2)  # depths at which each token is left out once, for every fourth question
SEED = 1905
console = Console()


def entering(model: Any, inputs: Any, *, gradient: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What enters each decoder layer, ``(1, S, D)``, and the logits ``(S, vocabulary)``."""
    held: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if gradient and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        if gradient:
            hidden.retain_grad()
        held.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    layers = adapter_for(model).layers
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.enable_grad() if gradient else torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return held, logits


def likeness(hidden: torch.Tensor, visual: torch.Tensor) -> dict[str, float]:
    """How alike the visual tokens are at a depth: mean cosine, pairs above the threshold, tokens never suppressed."""
    features = hidden[:, visual]
    there = torch.ones(features.shape[:2], dtype=torch.bool)
    found = {}
    for name, rows in (("plain", features), ("centred", centred(features, there))):
        unit = unit_length(rows)[0]
        near = unit @ unit.T
        n = len(unit)
        pairs = near[~torch.eye(n, dtype=torch.bool)]
        left, alive = 0, torch.ones(n, dtype=torch.bool)
        while alive.any():
            first = int(alive.nonzero()[0])
            left += 1
            alive &= near[first] < THRESHOLD
            alive[first] = False
        found |= {
            f"{name}/mean": float(pairs.mean()),
            f"{name}/pairs": float((pairs >= THRESHOLD).float().mean()),
            f"{name}/left": left / n,
        }
    return found


def agreement(ours: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Spearman's rank correlation, and the share of the reference's best tokens among ours."""
    ranks = [values.argsort().argsort().double() for values in (ours, reference)]
    best = [set(values.topk(BEST).indices.tolist()) for values in (ours, reference)]
    return {"rank": float(torch.corrcoef(torch.stack(ranks))[0, 1]), "best": len(best[0] & best[1]) / BEST}


def left_out(model: Any, inputs: Any, depth: int, logits: torch.Tensor, batch: int = 48) -> torch.Tensor:
    """How far the log-probability of the first answer token falls when each visual token alone is dropped."""
    stage = trio.Stage(after_layer=depth, keep=1, scorer="random", selector="top-k")
    pipeline = trio.Pipeline(model, stages=[stage])
    answer = int(logits[-1].argmax())
    before = float(F.log_softmax(logits[-1].float(), -1)[answer])
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    report_tokens = len(pipeline.score(inputs)[0][0])
    assert report_tokens <= tokens  # newlines are not visual
    fell = []
    for first in range(0, report_tokens, batch):
        dropped = range(first, min(first + batch, report_tokens))
        kept = [[[i for i in range(report_tokens) if i != gone]] for gone in dropped]
        many = {name: torch.cat([value] * len(dropped)) for name, value in inputs.items()}
        with pipeline.replay([kept]), torch.no_grad():
            after = model(**many, use_cache=False, logits_to_keep=1).logits[:, -1]
        fell += (before - F.log_softmax(after.float(), -1)[:, answer]).tolist()
    return torch.tensor(fell)


def question(model: Any, inputs: Any, leave_out: bool) -> dict[str, float]:
    """All numbers of one question."""
    found: dict[str, float] = {}
    visual = inputs["input_ids"][0] == model.config.image_token_id
    hidden, logits = entering(model, inputs)
    for depth, states in enumerate(hidden):
        found |= {f"{depth}/{name}": value for name, value in likeness(states, visual).items()}
    held, traced = entering(model, inputs, gradient=True)
    rows = traced[-ROWS:].float()
    F.cross_entropy(rows, rows.argmax(-1)).backward()
    for depth in DEPTHS:
        end = held[depth].grad[0, visual].float().norm(dim=-1)
        local: dict[str, torch.Tensor] = {}
        for way, (_, parameters) in WAYS.items():
            scorer = {"name": "objective-gradient", **parameters}
            stage = trio.Stage(after_layer=depth, keep=1, scorer=scorer)
            local[way] = trio.Pipeline(model, stages=[stage]).score(inputs)[0][0]
        places = _images(model, inputs, visual)
        for way, values in local.items():
            found |= {f"{depth}/{way}/gradient/{k}": v for k, v in agreement(values, end[places]).items()}
        if leave_out and depth in LEFT_OUT:
            fell = left_out(model, inputs, depth, logits)
            for way, values in local.items():
                found |= {f"{depth}/{way}/left out/{k}": v for k, v in agreement(values, fell).items()}
            found |= {f"{depth}/end/left out/{k}": v for k, v in agreement(end[places], fell).items()}
    model.zero_grad()
    return found


def _images(model: Any, inputs: Any, visual: torch.Tensor) -> torch.Tensor:
    """Places of the image's tokens among the placeholders (newlines left out)."""
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=0, keep="50%", scorer="random", selector="top-k")])
    with pipeline, torch.no_grad():
        model(**inputs, use_cache=False)
    image = pipeline.report.samples[0].images[0]
    if image.tokens == int(visual.sum()):
        return torch.arange(image.tokens)
    rows, columns = image.grids[-1]
    whole = image.grids[0][0] * image.grids[0][1]
    tiles = torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    return torch.cat([torch.arange(whole), whole + tiles.flatten()])


def mean(values: Sequence[tuple[float, int]]) -> Estimate:
    """The mean of values with their scenes, and its 95% interval, scenes drawn together."""
    draws = np.random.default_rng(0)
    totals: dict[int, list[float]] = {}
    for value, scene in values:
        totals.setdefault(scene, []).append(value)
    sums = np.array([[sum(v), len(v)] for v in totals.values()])
    chosen = sums[draws.integers(len(sums), size=(2000, len(sums)))].sum(1)
    low, high = np.quantile(chosen[:, 0] / chosen[:, 1], (0.025, 0.975))
    return Estimate(mean=float(sums[:, 0].sum() / sums[:, 1].sum()), low=float(low), high=float(high))


def measure(name: str, scenes: int) -> dict[str, Any]:
    """All numbers of a model: means over questions about `scenes` held-out scenes."""
    model, processor = zoo.load(name)
    many = any_size(model)
    found: dict[str, list[tuple[float, int]]] = {}
    asked = examples("test", SEED, scenes, varied=many)
    for number, example in enumerate(asked):
        inputs = processor(images=[example.image], text=[prompt(processor, example.question)], return_tensors="pt")
        numbers = question(model, dict(inputs), leave_out=number % 4 == 0)
        for key, value in numbers.items():
            found.setdefault(key, []).append((value, example.scene))
        console.print(f"{name}: question {number + 1} of {len(asked)}")
    return {
        "model": name,
        "scenes": scenes,
        "questions": len(asked),
        "seed": SEED,
        "layers": len(adapter_for(model).layers),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trio-vlm": trio.__version__,
        },
        "means": {key: mean(values).model_dump() for key, values in sorted(found.items())},
    }


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page, from the committed results."""
    lines = [
        "# What the saliency measures, and what suppression suppresses",
        "",
        "Made by `python -m benchmarks.saliency --table` from committed results, which",
        "`python -m benchmarks.saliency MODEL` measures. The models are the zoo's small ones: the numbers show how",
        "the parts behave there, and rank nothing else. All means are over held-out questions, with 95% intervals",
        "clustered by scene; tokens are left out one by one for every fourth question.",
    ]
    for data in results:
        means = {key: Estimate(**value) for key, value in data["means"].items()}
        lines += ["", f"## {data['model']}", "", f"{data['questions']} questions about {data['scenes']} scenes."]
        lines += ["", "### How alike visual tokens are at each depth", ""]
        lines += [
            f"A token is a duplicate at a cosine of {THRESHOLD} or more. *Left*: the share of tokens that greedy "
            "suppression keeps when it visits all of them; it decides something as long as fewer are asked for. "
            "*Centred*: without the mean of the image's tokens.",
            "",
            "| entering layer | mean cosine | duplicate pairs | left | centred: mean cosine | duplicate pairs | left |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for depth in range(data["layers"]):
            cells = [means[f"{depth}/{way}/mean"].mean for way in ("plain", "centred")]
            shares = [
                [100 * means[f"{depth}/{way}/{what}"].mean for what in ("pairs", "left")]
                for way in ("plain", "centred")
            ]
            lines.append(
                f"| {depth} | {cells[0]:.2f} | {shares[0][0]:.1f}% | {shares[0][1]:.0f}% | {cells[1]:.2f} | "
                f"{shares[1][0]:.1f}% | {shares[1][1]:.0f}% |"
            )
        lines += ["", "### How close the layer-local saliency comes", ""]
        lines += [
            f"Spearman's rank correlation over the visual tokens of a question, and how many of the reference's {BEST} "
            "best tokens are among the saliency's.",
            "",
            "| entering layer | saliency | reference | rank correlation | best in common |",
            "| ---: | --- | --- | ---: | ---: |",
        ]
        for depth in DEPTHS:
            for way, label in (*((way, label) for way, (label, _) in WAYS.items()), ("end", "end-to-end gradient")):
                for reference, title in (("gradient", "end-to-end gradient"), ("left out", "leave one out")):
                    key = f"{depth}/{way}/{reference}"
                    if f"{key}/rank" not in means:
                        continue
                    rank, best = means[f"{key}/rank"], means[f"{key}/best"]
                    lines.append(
                        f"| {depth} | {label} | {title} | {rank.mean:.2f} ({rank.low:.2f} to {rank.high:.2f}) | "
                        f"{100 * best.mean:.0f}% ({100 * best.low:.0f} to {100 * best.high:.0f}) |"
                    )
    return "\n".join(lines) + "\n"


def main(
    name: Annotated[str | None, typer.Argument(help="Zoo model to measure.")] = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 12,
    table: Annotated[bool, typer.Option("--table", help="Write docs/saliency.md from the committed results.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, or write the page."""
    torch.set_num_threads(threads)
    if name is not None:
        (RESULTS / f"saliency-{name}.json").write_text(json.dumps(measure(name, scenes), indent=1) + "\n")
    if table:
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("saliency-*.json"))]
        PAGE.write_text(page(found))


if __name__ == "__main__":
    typer.run(main)
