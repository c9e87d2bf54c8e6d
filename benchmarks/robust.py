"""The default chosen by the model on which it does worst, and judged on models that had no say.

``python -m benchmarks.robust choose MODEL`` asks the candidates about scenes of the split ``validation`` and writes
``benchmarks/results/choose-MODEL.json``; ``python -m benchmarks.robust verdict MODEL`` asks the chosen one and its
comparators about fresh scenes of the split ``test``, drawn from another seed, and writes ``verdict-MODEL.json``. Both
keep their answers under ``runs/``, so that a stopped run goes on. docs/robustness.md has what came out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.evaluate import RELEASED, THREE, soft, spread_once, three_stages, two_stages
from trio import zoo
from trio.measure.evaluation import shapesvqa
from trio.measure.evaluation.answers import AnswerFiles, RowAnswer
from trio.measure.evaluation.equal import equal_cost
from trio.measure.evaluation.protocol import weights
from trio.measure.evaluation.rows import EvaluationRow
from trio.measure.evaluation.runner import Runner
from trio.measure.evaluation.summary import right_of
from trio.measure.shapesvqa.task import canvas_for
from trio.spec import load_spec

RESULTS = Path(__file__).parent / "results"
#: Models that choose, and the one that has no say.
CHOOSING = ("tiny-llava", "tiny-llava-seed1", "tiny-llava-early", "tiny-qwen2.5-vl")
UNTUNED = "tiny-llava-late"
BUDGETS = {"22": "22.2%", "11": "11.1%"}
#: Seed of the scenes of the verdict; those of docs/results.md are of seed 0.
SEED = 2026
MARGIN = 2.0
"""Points by which the default may be worse, on any judging model, against any comparator."""
#: The candidate that was chosen, by `regrets` on the choosing models.
CHOSEN = "two stages (trio-soft)"
console = Console()


class RobustStep(StrEnum):
    """What is run."""

    CHOOSE = "choose"
    VERDICT = "verdict"


def _of(share: str) -> dict[str, str]:
    return {"share": share, "of": "current"}


STEEP = {"3.2%": "auto", "25%": _of("45%"), "50%": _of("35%")}
GENTLE = {"3.2%": "auto", "31.3%": _of("70%"), "62.5%": _of("50%")}
LATE = {"3.2%": "auto", "62.5%": _of("30%")}
QUARTER = {"3.2%": "auto", "25%": _of("50%")}


def candidates() -> dict[str, dict[str, Any]]:
    """What may become the default: fields of a spec by name."""
    return {
        "two stages (trio-soft)": {"stages": two_stages()},
        "one stage at the input": {"stages": spread_once({"0%": "auto"})},
        "three stages": {"stages": spread_once(THREE)},
        "three stages, steeper": {"stages": spread_once(STEEP)},
        "three stages, gentler": {"stages": spread_once(GENTLE)},
        "two stages, 50% after a quarter": {"stages": spread_once(QUARTER)},
        "two stages, 30% after 62.5%": {"stages": spread_once(LATE)},
        "three stages, weight 0.5": {"stages": spread_once(THREE, selector=soft(weight=0.5))},
        "three stages, weight 0.1": {"stages": spread_once(THREE, selector=soft(weight=0.1))},
        "three stages, spread 1.4": {"stages": spread_once(THREE, selector=soft(spread=1.4))},
        "three stages, released rows": {"stages": spread_once(THREE, scorer="trio")},
        "three stages, nms": {"stages": three_stages(selector="nms")},
        "divprune + two stages": {
            "compressor": {"name": "divprune", "keep": "{1.25}"},
            "stages": spread_once({"50%": _of("60%")}, selector=soft(spread=0.0)),
        },
        "resize 60% + two stages": {"resize": "60%", "stages": two_stages()},
        "resize 60% + three stages": {"resize": "60%", "stages": spread_once(THREE)},
    }


def comparators(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the default is held against, beside a smaller image at its own total cost."""
    dull = [{**stage, "selector": {**stage["selector"], "weight": 0.0}} for stage in chosen["stages"]]
    return {
        "TRIO (released), original positions": {"stages": three_stages(**RELEASED), "positions": "original"},
        "divprune": {"compressor": {"name": "divprune", "keep": "{1}"}},
        "diversity only": {**chosen, "stages": dull},
    }


def specs_of(fields: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A spec for each name and budget; ``{x}`` stands for x times the budget."""
    for name, given in fields.items():
        for label, share in BUDGETS.items():
            value = float(share.rstrip("%"))
            spec: dict[str, Any] = {"version": 1, "name": f"{name}, {label}%", **given}
            if "compressor" in spec:
                keep = f"{float(spec['compressor']['keep'].strip('{}')) * value:.2f}%"
                spec["compressor"] = {**spec["compressor"], "keep": keep}
            if "stages" in spec and "compressor" not in spec:
                scale = float(spec["resize"].rstrip("%")) / 100 if "resize" in spec else 1.0
                spec["budget"] = {"average": f"{value / scale:.2f}%"}
            yield spec


def answered(
    model: Any,
    processor: Any,
    name: str,
    part: RobustStep,
    specs: Sequence[dict[str, Any]],
    split: str,
    seed: int,
    scenes: int,
) -> tuple[Runner, dict[str, EvaluationRow], dict[str, list[RowAnswer]], AnswerFiles]:
    """The answers of the full model and of specs; what was answered before is not asked again."""
    task = shapesvqa(split, seed=seed, limit=scenes, canvas=canvas_for(model))  # type: ignore[arg-type]  # a literal
    runner = Runner(model, processor, task, 32)
    rows = {"full": EvaluationRow("full", "full", "full")}
    rows |= {spec["name"]: EvaluationRow(spec["name"], spec["name"], spec=load_spec(spec)) for spec in specs}
    about = {"weights": weights(model), "task": task.fingerprint(), "versions": _versions()}
    files = AnswerFiles(Path("runs") / f"{part.value}-{name}", about)
    return runner, rows, asked(runner, list(rows.values()), files), files


def asked(runner: Runner, rows: Sequence[EvaluationRow], files: AnswerFiles) -> dict[str, list[RowAnswer]]:
    """Asks all rows."""
    with Progress(console=console) as bar:
        job = bar.add_task(f"{len(rows)} rows")
        return runner.run(rows, files, lambda done, total: bar.update(job, completed=done, total=total))


def total_cost(answers: Sequence[RowAnswer]) -> float:
    """Mean FLOPs of a whole answer: tower, scoring, language model, decoding."""
    counted = [one.answer_flops for one in answers if one.answer_flops is not None]
    if len(counted) < len(answers):
        raise SystemExit("FLOPs of this model are not counted, so that nothing can be compared at equal cost")
    return fmean(counted)


def pruned_at_cost(judged: str, label: str, answers: Mapping[str, Sequence[RowAnswer]]) -> EvaluationRow:
    """DivPrune with as many tokens as the judged row's total cost allows: it pays for no score.

    The count lies on the line through what DivPrune costs at the two budgets; what it then costs is counted again.
    """
    (low, high), base = sorted(float(share.rstrip("%")) for share in BUDGETS.values()), "divprune, "
    costs = sorted(total_cost(answers[f"{base}{budget}%"]) for budget in BUDGETS)
    keep = low + (total_cost(answers[judged]) - costs[0]) * (high - low) / (costs[1] - costs[0])
    name = f"divprune to {keep:.1f}%, equal cost, {label}%"
    spec = {"version": 1, "name": name, "compressor": {"name": "divprune", "keep": f"{min(keep, 100.0):.2f}%"}}
    return EvaluationRow(name, name, spec=load_spec(spec))


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def content(runner: Runner, name: str, answers: Mapping[str, Sequence[RowAnswer]]) -> dict[str, Any]:
    """What is written: who was asked, and for each row who was right, at which cost."""
    samples = runner.task.samples
    rows = {
        row: {
            "right": right_of(runner.task, given),
            "answer_flops": round(total_cost(given)),
            "average": round(fmean(one.average for one in given), 2),
        }
        for row, given in answers.items()
    }
    return {
        "model": {"name": name, "weights": weights(runner.model), "layers": len(runner.adapter.layers)},
        "task": {**runner.task.facts, "sha256": runner.task.fingerprint(), "scenes": runner.task.scenes},
        "versions": _versions(),
        "scene": [sample.scene for sample in samples],
        "kind": [sample.kind for sample in samples],
        "rows": rows,
    }


def main(
    part: Annotated[RobustStep, typer.Argument(help="choose or verdict.")],
    name: Annotated[str, typer.Argument(help="Zoo model.")],
    scenes: Annotated[int, typer.Option(help="Scenes.")] = 80,
    chosen: Annotated[str, typer.Option(help="Name of the candidate that is judged.")] = CHOSEN,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Ask, and write the results file."""
    torch.set_num_threads(threads)
    if part is RobustStep.CHOOSE and name == UNTUNED:
        raise typer.BadParameter(f"{name} has no say: it is what the choice is judged by")
    model, processor = zoo.load(name)
    fields = candidates()
    if part is RobustStep.VERDICT:
        fields = {chosen: fields[chosen], **comparators(fields[chosen])}
    split, seed = ("validation", 0) if part is RobustStep.CHOOSE else ("test", SEED)
    specs = [spec for spec in specs_of(fields) if canvas_for(model) == "varied" or "resize" not in spec]
    runner, rows, answers, files = answered(model, processor, name, part, specs, split, seed, scenes)
    equal: dict[str, list[str]] = {}
    if part is RobustStep.VERDICT:
        judged = [row for row in rows.values() if row.name == "full" or row.name.startswith(f"{chosen}, ")]
        found = equal_cost(runner, judged, answers)
        more = {row.name: row for row in found.rows if not row.refused}
        equal = {spec: [row] for spec, row in found.of.items() if row in more}
        for label in BUDGETS:
            row = pruned_at_cost(f"{chosen}, {label}%", label, answers)
            more[row.name] = row
            equal.setdefault(f"{chosen}, {label}%", []).append(row.name)
        answers |= asked(runner, list(more.values()), files)
    written = content(runner, name, answers) | ({"chosen": chosen, "equal_cost": equal} if equal else {})
    file = RESULTS / f"{part.value}-{name}.json"
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for row, one in written["rows"].items():
        share = one["right"].count("1") / len(one["right"])
        console.print(f"{row:55} {100 * share:5.1f}% {one['answer_flops'] / 1e9:.3f} GFLOP", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
