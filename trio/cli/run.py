"""`trio run`: one question, answered by the full model and by the compressed one."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DEFAULT_SPEC
from .common import OUT, Device, DType, DTypeName, Force, Json, MaxNewTokens, ModelName, SpecName

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cost import CostPrediction
    from ..report import CompressionReport

OVERLAY = Path("trio-overlay.png")
#: Rounds of measuring at most (the first is not counted), and seconds after which no further one starts.
ROUNDS, PATIENCE = 12, 3.0
SMALL = 10**11  # FLOPs of a prefill below which a processor's time goes to dispatching operations, not to them


def run(
    model: ModelName = "tiny-llava",
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Image file; may be repeated. Default: the bundled one."),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What to ask. Default: the bundled question.")
    ] = None,
    spec: SpecName = DEFAULT_SPEC,
    out: Annotated[
        Path | None,
        typer.Option(
            *OUT,
            help=f"File that the kept tokens are drawn to. Default: {OVERLAY} or the next free name; none with --json.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    max_new_tokens: MaxNewTokens = 32,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Answer a question about an image twice, full and compressed, and show what was saved."""
    from .. import zoo
    from ..errors import InputError
    from ..spec import load_spec
    from .common import load_image, load_model, print_json, say, unused

    loaded = load_spec(spec)  # before the model: a wrong name should not cost a minute
    files = list(image or [zoo.demo_image()])
    if question is None:
        if image:
            raise InputError("--question: missing; an image of your own needs a question, --question TEXT.")
        question = zoo.demo_question()
    if not question.strip():
        raise InputError("--question: it is empty; give the text to ask.")
    if out is not None:
        target: Path | None = _drawing(out, force)
    else:
        target = None if as_json else unused(OVERLAY)
    images = [load_image(file) for file in files]
    network, processor = load_model(model, dtype=dtype.value, device=device)

    result = _answer_twice(network, processor, images, question, loaded, max_new_tokens)
    if target is not None:
        try:
            _draw(target, images, processor, result["report"])
        except InputError as error:
            if out is not None:
                raise
            say(f"nothing drawn: {error}", err=True)
            target = None
    facts = _facts(model, loaded.name, question, files, target, result)
    if as_json:
        print_json(facts)
    else:
        _print(facts, result)


def _drawing(target: Path, force: bool) -> Path:
    """The path of the drawing, refused early where it cannot be written."""
    from ..errors import InputError
    from .common import writable

    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {str(target)!r}: the name has to end in .png, .jpg or .webp.")
    return writable(target, "--out", force=force)


def _answer_twice(
    model: Any, processor: Any, images: list[Any], question: str, spec: Any, max_new_tokens: int
) -> dict[str, Any]:
    from ..pipeline import Pipeline
    from .common import inputs_for

    pipeline = Pipeline.from_spec(spec, model, report="full")
    both = {False: processor, True: pipeline.processor(processor)}
    inputs = {
        compressed: inputs_for(one, images, question).to(model.device, dtype=model.dtype)
        for compressed, one in both.items()
    }

    def answer(compressed: bool, length: int) -> Any:
        given = inputs[compressed]
        tokens = model.generate(**given, max_new_tokens=length, do_sample=False)
        return tokens[0, given["input_ids"].shape[1] :]

    lengths = (1, max_new_tokens)
    seconds: dict[tuple[bool, int], list[float]] = {}
    results: dict[bool, Any] = {}
    begin = time.perf_counter()
    rounds = 0
    # Full and compressed take turns, so that what else the machine does falls on both; the first round pays for loading
    # and caches and is not measured.
    while rounds < 2 or (rounds < ROUNDS and time.perf_counter() - begin < PATIENCE):
        for compressed in (False, True):
            with pipeline if compressed else nullcontext():
                for which, length in enumerate(lengths):
                    taken, results[compressed] = _timed(model, partial(answer, compressed, length))
                    seconds.setdefault((compressed, which), []).append(taken)
        rounds += 1
    medians = {key: median(taken[1:]) for key, taken in seconds.items()}
    report = pipeline.report
    before = None if report.resize is None else pipeline.adapter.image_counts(inputs[False])
    answers = [results[compressed] for compressed in (False, True)]
    return {
        "answers": [processor.decode(tokens, skip_special_tokens=True).strip() for tokens in answers],
        "generated": [len(tokens) for tokens in answers],
        "prefill": (medians[False, 0], medians[True, 0]),
        "total": (medians[False, 1], medians[True, 1]),
        "report": report,
        "visual_tokens": report.visual_tokens if before is None else sum(before[0]),
        "cost": _cost(report, spec, model, before),
    }


def _timed(model: Any, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the wall clock, and the result; queued work of an accelerator is waited for."""
    import torch

    def wait() -> None:
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def _cost(report: CompressionReport, spec: Any, model: Any, before: list[list[int]] | None) -> CostPrediction | str:
    """The predicted cost of what ran, or why it is not known."""
    from ..cost import of_report, shape_of
    from ..errors import TrioError

    try:
        return of_report(report, spec, shape_of(model.config), before=before)
    except TrioError as error:
        return str(error)


def _draw(target: Path, images: list[Any], processor: Any, report: CompressionReport) -> None:
    from ..errors import InputError
    from ..report.draw import overlay_from_report, seen_region

    regions = [seen_region(image, processor) for image in images]
    drawn = overlay_from_report(images, report, regions=regions)
    try:
        drawn.save(target)
    except OSError as error:
        raise InputError(f"--out {str(target)!r}: cannot be written ({error.strerror or error}).") from error


def _facts(
    model: str, spec: str, question: str, files: list[Path], target: Path | None, result: dict[str, Any]
) -> dict[str, Any]:
    report: CompressionReport = result["report"]
    cost: CostPrediction | str = result["cost"]
    full, compressed = result["answers"]
    sample = report.samples[0]
    by_layer = sample.visual_by_layer(report.num_layers)
    return {
        "model": model,
        "spec": spec,
        "images": [str(file) for file in files],
        "question": question,
        "answer": {"full": full, "compressed": compressed},
        "same_answer": full == compressed,
        "visual_tokens": result["visual_tokens"],
        "resize": None if report.resize is None else {"asked": report.resize, "visual_tokens": report.visual_tokens},
        "average_kept": report.average_kept,
        "retention": report.average_kept / max(1, result["visual_tokens"]),
        "kept": sample.kept_by_stage,
        "stages": [
            {"after_layer": stage.after_layer, "tokens_in": stage.tokens_in, "kept": stage.kept}
            for stage in sample.stages
        ],
        "visual_by_layer": by_layer,
        "flops": None
        if isinstance(cost, str)
        else {"full": cost.full.flops.total, "compressed": cost.compressed.flops.total},
        "flops_reduction": None if isinstance(cost, str) else cost.flops_reduction,
        "kv_bytes": None
        if report.kv_bytes is None
        else {"full": (full_kv := _full_kv(report, result["visual_tokens"])), "compressed": report.kv_bytes.measured},
        "kv_reduction": None if report.kv_bytes is None else full_kv / max(1, report.kv_bytes.measured),
        "seconds": {
            "prefill": dict(zip(("full", "compressed"), result["prefill"], strict=True)),
            "answer": dict(zip(("full", "compressed"), result["total"], strict=True)),
            "phases": report.timing,
        },
        "new_tokens": dict(zip(("full", "compressed"), result["generated"], strict=True)),
        "notes": _notes(report, cost),
        "overlay": None if target is None else str(target),
    }


def _full_kv(report: CompressionReport, visual_tokens: int) -> int:
    """Bytes of the cache of the full model, whose images are not resized and have so many tokens."""
    assert report.kv_bytes is not None  # of a report of the level ``full``
    if visual_tokens == report.visual_tokens:
        return report.kv_bytes.full_equivalent
    held = sum(map(sum, report.layer_tokens))  # one prompt: nothing is padded
    return report.kv_bytes.full_equivalent + (
        report.kv_bytes.measured * report.num_layers * (visual_tokens - report.visual_tokens) // max(1, held)
    )


def _notes(report: CompressionReport, cost: CostPrediction | str) -> list[str]:
    if isinstance(cost, str):
        return [*report.notes, cost]
    small = cost.full.flops.total < SMALL
    note = (
        "a model this small spends its time on overhead outside the layers, so its times say nothing about large ones"
    )
    return [*report.notes, *cost.notes, *([note] if small else [])]


def _print(facts: dict[str, Any], result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .tables import console, duration, layer_ranges, print_table, quantity, times

    out = console()
    out.print(Text(f"{facts['model']}, spec {facts['spec']}", style="bold"))
    out.print(Text(f"question    {facts['question']}"))
    out.print(Text(f"full        {facts['answer']['full']}"))
    style = "green" if facts["same_answer"] else "yellow"
    out.print(Text(f"compressed  {facts['answer']['compressed']}", style=style))
    out.print()

    table = Table(title=None, header_style="bold")
    table.add_column("")
    for name in ("full", "compressed", "ratio"):
        table.add_column(name, justify="right")

    def ratio(full: float, compressed: float) -> str:
        return times(full / compressed if compressed else None)

    by_layer = facts["visual_by_layer"]
    full_tokens = facts["visual_tokens"]
    if facts["resize"] is not None:
        resized = facts["resize"]["visual_tokens"]
        table.add_row("visual tokens, resized", str(full_tokens), str(resized), ratio(full_tokens, resized))
    for layers, (kept,) in layer_ranges(by_layer):
        table.add_row(f"visual tokens, layer {layers}", str(full_tokens), str(kept), ratio(full_tokens, kept))
    average = facts["average_kept"]
    table.add_row(
        "visual tokens, average", str(full_tokens), f"{average:.1f}", ratio(full_tokens, average), end_section=True
    )
    if facts["flops"] is not None:
        full, compressed = facts["flops"]["full"], facts["flops"]["compressed"]
        table.add_row(
            "FLOPs, prefill and tower", quantity(full, "FLOP"), quantity(compressed, "FLOP"), ratio(full, compressed)
        )
        cost = result["cost"]
        language, smaller = cost.full.flops.language, cost.compressed.flops.language
        table.add_row(
            "  language model only", quantity(language, "FLOP"), quantity(smaller, "FLOP"), ratio(language, smaller)
        )
    if facts["kv_bytes"] is not None:
        full, compressed = facts["kv_bytes"]["full"], facts["kv_bytes"]["compressed"]
        table.add_row(
            "KV cache", quantity(full, "B", base=1024), quantity(compressed, "B", base=1024), ratio(full, compressed)
        )
    for name, key in (("time to first token", "prefill"), ("time of the answer", "answer")):
        full, compressed = facts["seconds"][key]["full"], facts["seconds"][key]["compressed"]
        table.add_row(name, duration(full), duration(compressed), ratio(full, compressed))
    print_table(out, table)
    for note in facts["notes"]:
        out.print(Text(f"note: {note}"))
    if facts["overlay"] is not None:
        out.print(Text(f"kept tokens drawn to {facts['overlay']}"), soft_wrap=True)
