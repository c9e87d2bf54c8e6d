"""The published results of LLaVA-1.5-7B, and what lmms-eval measures, beside each other.

``llava-1.5-7b.csv`` is the table of https://arxiv.org/abs/2602.04657 for LLaVA-1.5-7B: benchmark scores by method and
by visual tokens kept on average, and the mean over benchmarks of the score in percent of the full model's. The
numbers are the authors'; none was measured here.

``python -m benchmarks.expected RESULTS.json ...`` prints results of ``lmms_eval --model trio`` beside them;
``docs/lmms-eval.md`` has the commands that make such results.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio.errors import InputError

HERE = Path(__file__).parent
VANILLA = ("576 tokens, no reduction", "Vanilla")

#: Row of the table that a shipped spec is to reproduce.
ROWS: dict[str, tuple[str, str]] = {
    "none": VANILLA,
    **{f"trio-llava-1.5-{n}": (f"{n} tokens, without encoder", "TRIO") for n in (192, 128, 64)},
    **{f"trio-scan-llava-1.5-{n}": (f"{n} tokens, with encoder", "TRIO") for n in (192, 128, 64)},
    **{f"visionzip-llava-1.5-{n}": (f"{n} tokens, with encoder", "VisionZip") for n in (192, 128, 64)},
}


@dataclass(frozen=True)
class Source:
    """Where lmms-eval has a column's number: the sum of some metrics of a task, times a factor.

    Attributes:
        task: of lmms-eval, or of ``benchmarks/expected/tasks``.
        metrics: their names.
        factor: to the table's unit.
        remark: why the number is not the published one's kind; empty where it is.
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 1.0
    remark: str = ""


#: For each column of the table the tasks that measure it, the most fitting first.
SOURCES: dict[str, tuple[Source, ...]] = {
    "gqa": (Source("gqa", ("exact_match",), 100),),
    "mmb": (Source("mmbench_en_dev", ("gpt_eval_score",)), Source("mmbench_en_dev_static", ("gpt_eval_score",))),
    "mmb_cn": (Source("mmbench_cn_dev", ("gpt_eval_score",)),),
    "mme": (Source("mme", ("mme_perception_score", "mme_cognition_score")),),
    "pope": (Source("pope", ("pope_f1_score",), 100),),
    "sqa": (Source("scienceqa_img", ("exact_match",), 100),),
    "vqav2": (
        Source("vqav2_val", ("exact_match",), 100, "measured on the validation split; published: test-dev, by upload"),
    ),
    "textvqa": (
        Source("textvqa_val_ocr", ("exact_match",), 100),
        Source("textvqa_val", ("exact_match",), 100, "measured without OCR words in the prompt; published: with them"),
    ),
}
#: Columns that no table of the paper has, and that people use now.
MORE: dict[str, tuple[Source, ...]] = {
    "docvqa": (Source("docvqa_val", ("anls",), 100),),
    "chartqa": (Source("chartqa", ("relaxed_overall",), 100),),
    "ocrbench": (Source("ocrbench", ("ocrbench_accuracy",), 100),),
    "refcoco": (Source("refcoco_bbox_rec_val", ("refcoco_ACC@0.5",), 100),),
}
ALL_SOURCES = {**SOURCES, **MORE}


def published(file: str = "llava-1.5-7b.csv") -> dict[tuple[str, str], dict[str, float]]:
    """A table: known scores by column for each (setting, method); ``average_percent`` among them."""
    with (HERE / file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = [*SOURCES, "average_percent"]
    return {(row["setting"], row["method"]): {name: float(row[name]) for name in columns if row[name]} for row in rows}


def spec_of(results: Mapping[str, Any]) -> str:
    """The spec that a results file of lmms-eval was measured with: ``none``, a shipped name, or a file's stem.

    Raises:
        InputError: the file is not of ``--model trio``.
    """
    arguments = results.get("config", {}).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    if not isinstance(arguments, Mapping) or "spec" not in arguments:
        raise InputError("results: config.model_args names no spec; give a results file of `lmms_eval --model trio`.")
    name = str(arguments["spec"])
    return Path(name).stem if name.endswith((".yaml", ".yml", ".json")) else name


def measured(
    results: Mapping[str, Any], columns: Mapping[str, tuple[Source, ...]] = ALL_SOURCES
) -> dict[str, tuple[float, str]]:
    """What lmms-eval measured, by column of the table: the score in the table's unit, and a remark or nothing."""
    tasks = results.get("results", {})
    found = {}
    for column, sources in columns.items():
        for source in sources:
            values = [tasks.get(source.task, {}).get(f"{metric},none") for metric in source.metrics]
            if all(isinstance(value, int | float) for value in values):
                found[column] = (sum(values) * source.factor, source.remark)
                break
    return found


@dataclass(frozen=True)
class PublishedLine:
    """A number of the table beside the measured one, which is None where that benchmark was not run."""

    column: str
    published: float
    measured: float | None
    remark: str = ""


def compare(scores: Mapping[str, tuple[float, str]], row: tuple[str, str]) -> list[PublishedLine]:
    """A published row beside measured scores.

    Args:
        scores: as `measured` gives them.
        row: setting and method.

    Raises:
        InputError: the table has no such row.
    """
    table = published()
    if row not in table:
        listed = "; ".join(f"{setting}/{method}" for setting, method in table)
        raise InputError(f"row: the table has no {'/'.join(row)!r}; it has {listed}.")
    return [PublishedLine(name, table[row][name], *scores.get(name, (None, ""))) for name in SOURCES]


def average_percent(scores: Mapping[str, float], full: Mapping[str, float], columns: Sequence[str]) -> float:
    """The mean over benchmarks of the score in percent of the full model's, as the paper averages."""
    return 100 * sum(scores[name] / full[name] for name in columns) / len(columns)
