"""`report.html`: one file that needs nothing else, made from `report.html.j2` by jinja2 (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from . import wording
from .figures import cost_curve, retention_curve, speed_curve
from .overlays import Overlay
from .results import OVERALL, EvaluationResults

__all__ = ["report_html"]

TEMPLATE = "report.html.j2"
INTRO = (
    "accuracy: percent of questions answered right; retained: (accuracy - no image) / (full - no image); counted: "
    "over the sub-tasks that pass the validity gate. Intervals are 95%, bootstrapped over scenes. tokens: visual "
    "tokens of the images shown; average: over the decoder layers. GFLOPs of a whole answer are counted: vision tower, "
    "prefill, scoring, decoding; a row at equal cost costs no more than its spec. Times are measured, all rows taking "
    "turns; the last column is the full model's time for a whole answer "
    "divided by the row's."
)


def report_html(results: EvaluationResults, drawn: Sequence[Overlay]) -> str:
    """The report.

    Args:
        results: of the evaluation.
        drawn: samples with what was kept.

    Raises:
        InputError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report.html")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    settings = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    page = jinja2.Environment(loader=loader, **settings).get_template(TEMPLATE)
    html: str = page.render(
        name=results.model["name"],
        facts=_facts(results),
        drawn_data=results.task["name"] == "shapesvqa",
        cost=cost_curve(results),
        retention=retention_curve(results),
        speed=speed_curve(results),
        findings=list(wording.findings(results)),
        tables=wording.tables(results),
        by_kind=_by_kind(results),
        intro=INTRO,
        notes=results.notes,
        samples=drawn,
    )
    return html + "\n"


def _facts(results: EvaluationResults) -> str:
    model, task = results.model, results.task
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"{model['class']}, {model['layers']} layers, {model['visual_tokens']} visual tokens, {model['dtype']}, "
        f"weights {model['weights'][:19]}; {task['name']} version {task['version']}, {task['questions']} questions on "
        f"{task['scenes']} images, sha256 {task['sha256'][:12]}; {versions}; {results.device}"
    )


def _by_kind(results: EvaluationResults) -> wording.Table:
    header = ["accuracy by sub-task", *results.kinds]
    rows = [
        [
            row.name,
            *(
                f"{row.accuracy[k].mean:.1f} ({row.accuracy[k].low:.0f} to {row.accuracy[k].high:.0f})"
                for k in results.kinds
            ),
        ]
        for row in wording.ordered(results)
        if OVERALL in row.accuracy
    ]
    return "By sub-task", header, rows
