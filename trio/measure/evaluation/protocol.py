"""One evaluation from beginning to end."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__
from ...errors import InputError
from ...spec import PipelineSpec, load_spec
from ..extras import require
from ..statistics import DRAWS, FEW
from .answers import AnswerFiles
from .equal import equal_cost, size_rows
from .processes import ALONE, Processes
from .results import EvaluationResults
from .rows import EvaluationRow, plan
from .runner import LOOKED_AT, Runner
from .speed import measure
from .summary import Summary
from .task import Task

__all__ = ["evaluate", "named_specs"]

SpecLike = str | Path | Mapping[str, Any] | PipelineSpec
ROUNDS = 5


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    specs: Sequence[SpecLike],
    *,
    out: str | Path | None = None,
    name: str = "",
    batch_size: int = 32,
    baseline: str | None = None,
    margin: float = 1.0,
    sizes: Sequence[float] = (),
    speed_rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> EvaluationResults:
    """Asks a model every question of a task, full, with every spec and with every control, and counts.

    Args:
        model: a vision-language model in evaluation mode.
        processor: its processor.
        task: the questions, for example `trio.measure.evaluation.shapesvqa()`.
        specs: what `trio.load_spec` takes, each with a name of its own; the first one of a budget is the baseline.
        out: folder for the answers; a run that was stopped goes on there, and more specs may be added. None: nothing is
            kept.
        name: what results call the model; by default where it was loaded from.
        batch_size: questions in a batch.
        baseline: name of the spec that all others are compared with, whatever their budget.
        margin: of the non-inferiority test, in points.
        sizes: shares of an image's visual tokens, above 0 and up to 1: the full model on such images (on pooled tokens
            where all images have the same number), which is the curve that specs are held against.
        speed_rounds: rounds of measuring times; 0: none.
        progress: told the finished and all batches.
        processes: that call this with the same arguments, each with a model of its own, and share the questions. All
            get the same results; the first one writes, and measures times.

    Raises:
        InputError: there is no spec, two have one name, or `out` holds answers to something else.
        TrioError: a spec does not fit the model.
    """
    require("scipy.stats", "evaluation")  # missing, it should not cost the answers
    loaded = named_specs(specs)
    check_baseline(baseline, loaded)
    check_sizes(sizes)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return evaluate(
                model,
                processor,
                task,
                loaded,
                out=folder,
                name=name,
                batch_size=batch_size,
                baseline=baseline,
                margin=margin,
                sizes=sizes,
                speed_rounds=speed_rounds,
                progress=progress,
                processes=processes,
            )
    runner = Runner(model, processor, task, batch_size)
    started = [runner.counter.of_size(size) for size in runner.sizes]
    typical = round(sum(started) / len(started))
    rows, schedules = plan(
        model,
        loaded,
        typical,
        several_images=task.scenes > 1,
        maps=all(sample.item_map is not None for sample in task.samples),
        smallest=runner.smallest(),
        entered={spec.name: spec.resized(typical) * _entered(runner, spec) for spec in loaded if _decides(spec)},
    )
    rows += size_rows(runner, sizes, loaded)
    facts = _model(model, name, runner, typical)
    versions = {
        "trio-vlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    task_facts = {"name": task.name, "version": task.version, **task.facts, "sha256": task.fingerprint()}
    header = {"model": facts, "task": task_facts, "versions": versions, "batch_size": batch_size}
    about = {**header, "max_new_tokens": task.max_new_tokens}
    files = processes.together(lambda: AnswerFiles(Path(out), about) if processes.first else None)
    possible = [row for row in rows if not row.refused]
    answers = runner.run(possible, files, progress, processes)
    equal = equal_cost(runner, possible, answers)  # found by what the specs have cost
    rows += equal.rows
    possible = [row for row in rows if not row.refused]
    answers = runner.run(possible, files, progress, processes)
    summary = Summary(task, rows, schedules, answers, equal=equal.of, baseline=baseline, margin=margin)
    results = EvaluationResults(
        model=facts,
        task={**task_facts, "questions": len(task.samples), "kinds": _counts(task), "scenes": task.scenes},
        settings={
            "batch_size": batch_size,
            "max_new_tokens": task.max_new_tokens,
            "bootstrap_draws": DRAWS,
            "baseline": baseline,
            "margin": margin,
        },
        versions=versions,
        rows=summary.rows(),
        gates=summary.gates,
        comparisons=summary.comparisons(),
        notes=_notes(runner, rows),
        questions={"scene": [s.scene for s in task.samples], "kind": [s.kind for s in task.samples]},
        right=summary.right,
        device=str(model.device),
    )
    processes.gather(lambda: None)  # times are measured when the others rest
    if not processes.first:
        return results
    return results.model_copy(update={"speed": measure(runner, possible, speed_rounds)})


def check_baseline(baseline: str | None, specs: Sequence[PipelineSpec]) -> None:
    """Refuse a baseline that is none of the specs.

    Raises:
        InputError: it is not.
    """
    names = [spec.name for spec in specs]
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline {baseline!r}: it is none of the specs; give one of {', '.join(names)}.")


def check_sizes(sizes: Sequence[float]) -> None:
    """Refuse shares that are none.

    Raises:
        InputError: one is 0 or less, or above 1.
    """
    for share in sizes:
        if not 0 < share <= 1:
            raise InputError(f"sizes: found {share:g}; give shares of an image's visual tokens above 0 and up to 1.")


def named_specs(specs: Sequence[SpecLike]) -> list[PipelineSpec]:
    """The specs, each with a name of its own; a file whose spec has none gives it the file's.

    Raises:
        InputError: there is none, or two have one name.
        TrioError: a spec is wrong.
    """
    loaded = []
    for source in specs:
        spec = load_spec(source)
        if spec.name == "custom" and isinstance(source, str | Path):
            spec = spec.model_copy(update={"name": Path(source).stem})
        loaded.append(spec)
    if not loaded:
        raise InputError("specs: none was given; name at least one, for example trio-soft-11.")
    names = [spec.name for spec in loaded]
    for one in names:
        if names.count(one) > 1:
            raise InputError(f"specs: {names.count(one)} of them are called {one!r}; give each a `name` of its own.")
    return loaded


def _decides(spec: PipelineSpec) -> bool:
    return spec.compressor is not None and spec.compressor.keep is None


def _entered(runner: Runner, spec: PipelineSpec) -> float:
    """Share of the tokens that a compressor leaves of the first images."""
    row = EvaluationRow(spec.name, spec.name, spec=spec)
    pipeline = runner.pipeline(row)
    first = {sample.scene: sample for sample in reversed(runner.task.samples)}
    kept = full = 0
    for scene in sorted(first)[:LOOKED_AT]:
        inputs = runner.inputs([([first[scene].load()], first[scene].question)], row)
        with pipeline, torch.no_grad():
            runner.model(**inputs)
        (sample,) = pipeline.report.samples
        kept, full = kept + sum(image.start for image in sample.images), full + sample.visual_tokens
    return kept / full


def _counts(task: Task) -> dict[str, int]:
    return {kind: sum(sample.kind == kind for sample in task.samples) for kind in task.kinds}


def _model(model: Any, name: str, runner: Runner, typical: int) -> dict[str, Any]:
    return {
        "name": name or Path(model.name_or_path).name or type(model).__name__,
        "class": type(model).__name__,
        "weights": weights(model),
        "layers": len(runner.adapter.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "visual_tokens": typical,
    }


def weights(model: Any) -> str:
    """SHA-256 of a model's weights as they are in memory, by name; of a large one on a hub its commit."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _notes(runner: Runner, rows: Sequence[EvaluationRow]) -> list[str]:
    notes = [] if runner.shape is not None else [runner.no_flops]
    scenes = runner.task.scenes
    if scenes < FEW:
        images = f"{scenes} {'image is' if scenes == 1 else 'images are'}"
        notes.append(f"{images} too few for intervals by bootstrap: they are too narrow")
    return notes + [f"{row.name}: not applicable: {row.refused}" for row in rows if row.refused]
