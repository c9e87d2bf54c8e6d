"""`report.html`: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from . import wording
from .figures import retention_curve, speed_curve
from .overlays import Overlay
from .results import OVERALL, Results

__all__ = ["report_html"]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .small { color: #555; font-size: 13px; } svg { max-width: 100%; height: auto; }
figure { margin: 0 0 1.4rem; } img { max-width: 100%; }
"""
INTRO = (
    "accuracy: percent of questions answered right; retained: (accuracy - no picture) / (full - no picture); counted: "
    "over the sub-tasks that pass the validity gate. Intervals are 95%, bootstrapped over scenes. tokens: visual "
    "tokens of the pictures shown; average: over the decoder layers. GFLOPs of a prefill with its vision tower are "
    "counted, times are measured, all rows taking turns; the last column is the full model's time for a whole answer "
    "divided by the row's."
)


def report_html(results: Results, drawn: Sequence[Overlay]) -> str:
    """The report.

    Args:
        results: of the evaluation.
        drawn: samples with what was kept.
    """
    return "\n".join(_page(results, drawn)) + "\n"


def _page(results: Results, drawn: Sequence[Overlay]) -> Iterator[str]:
    name = escape(str(results.model["name"]))
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}: what is kept</title>'
    yield f"<style>{STYLE}</style>"
    yield f"<h1>{name}: what is kept with fewer visual tokens</h1>"
    yield f'<p class="small">{escape(_facts(results))}</p>'
    if results.task["name"] == "shapesvqa":
        yield (
            "<p>ShapesVQA is drawn. It shows that the code works and how methods compare on small models that were "
            "trained on such pictures; it ranks nothing else.</p>"
        )
    yield f"<figure>{retention_curve(results)}<figcaption>Quality against retention.</figcaption></figure>"
    if results.speed:
        yield f"<figure>{speed_curve(results)}<figcaption>Quality against measured time.</figcaption></figure>"
    yield "<h2>What the numbers say</h2><ul>"
    yield from (f"<li>{escape(line)}</li>" for line in wording.findings(results))
    yield "</ul>"
    for title, header, rows in wording.tables(results):
        yield from _table(title, header, rows)
    yield f'<p class="small">{escape(INTRO)}</p>'
    yield from _table(*_by_kind(results))
    for note in results.notes:
        yield f'<p class="small">{escape(note)}</p>'
    if drawn:
        yield "<h2>Samples</h2>"
    for one in drawn:
        mark = "right" if one.given == one.answer else "wrong"
        text = f"{one.spec}: “{one.question}” {one.given!r} ({mark}; expected {one.answer!r})"
        picture = f'<img alt="what was kept" src="{one.png}">' if one.png else ""
        yield f"<figure>{picture}<figcaption>{escape(text)}</figcaption></figure>"
    yield "</html>"


def _facts(results: Results) -> str:
    model, task = results.model, results.task
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"{model['class']}, {model['layers']} layers, {model['visual_tokens']} visual tokens, {model['dtype']}, "
        f"weights {model['weights'][:19]}; {task['name']} version {task['version']}, {task['questions']} questions on "
        f"{task['scenes']} pictures, sha256 {task['sha256'][:12]}; {versions}; {results.device}"
    )


def _by_kind(results: Results) -> wording.Table:
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


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f'<h2>{escape(title)}</h2><div class="wide"><table><tr>'
    yield "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table></div>"
