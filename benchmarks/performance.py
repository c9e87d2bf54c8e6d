"""docs/performance.md from committed results: ``python -m benchmarks.performance``.

Results are ``benchmarks/results/bench-*.json`` (`benchmarks.speed`, `benchmarks.gpu`), ``compiled.json``
(`benchmarks.compiled`) and ``growth.json`` (`benchmarks.growth`). The page says of each which command made it, on which
shapes and machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trio.cli.tables import duration, quantity, times
from trio.measure.bench import BenchReport, BenchRow

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

<!-- written by: python -m benchmarks.performance -->

How fast a model is with compressed images, measured by [`trio bench`](cli.md#trio-bench-model) on models of
published shape with random weights, and how cost grows with the number of tokens. Every number stands in a
committed file that the named command wrote; what is an estimate says so. To measure your own checkpoint on your own
machine:

```console
$ trio bench llava-hf/llava-1.5-7b-hf --image cat.jpg --question "What is on the sofa?" --plot bench.png
$ python -m benchmarks.gpu     # on a CUDA machine, in a checkout: all of this page within 8 minutes
```

All ways take turns in every round, the first round is not counted, ratios are of the same rounds. "Oracle" is the
same model that is given the tokens to keep; what a spec takes beyond it is scoring, selecting and waiting. FLOPs
are counted by formula ([what a spec costs](cost.md)), tower included.

## Targets

| what | at most |
| --- | --- |
| prefill over the oracle's, on a processor | the counted share of scoring and selecting + 3 points |
| prefill over the oracle's, on an accelerator | 10% |
| a batch of 8 over the oracle's batch of 8 | 5% |
| speed-up / reduction of counted FLOPs, on a processor | at least 85% |
| a decode step over that of the untouched model with as short a cache | 3% |
| a prefill that keeps all tokens over the untouched model | 3% |
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bench_section(report: BenchReport) -> str:
    """What a benchmark found."""
    machine = report.machine
    load = "" if machine.load is None else f", load {machine.load:.1f} when it began"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    shape = (
        f"{report.layers} decoder layers, {report.dtype}, weights {report.weights}; batch of {report.batch}, image of "
        f"{report.image[0]} x {report.image[1]}, {report.visual_tokens} visual and {report.text_tokens} text tokens"
    )
    where = (
        f"{machine.device}, {machine.threads} threads{load}; {versions}. It reaches "
        f"{quantity(machine.flops_per_second, 'FLOP')}/s and {quantity(machine.bytes_per_second, 'B')}/s."
    )
    parts = [
        f"## {report.model}, batch of {report.batch}, {machine.device.partition(':')[0]}",
        f"`{report.command}`: {shape}. {where}",
        table(
            ("", "tokens", "FLOPs", "to first token", "faster", "interval", "a step", "memory", "launches"),
            (_cells(row) for row in report.rows),
        ),
    ]
    phased = [row for row in report.rows if row.phases]
    if phased:
        names = list(dict.fromkeys(name for row in phased for name in row.phases or {}))
        parts += [
            "Where the time goes (runs of their own, in which every phase is waited for):",
            table(("", *names), ([row.name, *(_seconds(row, name) for name in names)] for row in phased)),
        ]
    if report.targets:
        parts.append(
            table(
                ("target", "spec", "bound", "found", "", "where the time goes"),
                (
                    (
                        one.name,
                        one.spec or "",
                        f"{'at least' if one.at_least else 'at most'} {one.bound:.1%}",
                        f"{one.found:.1%}",
                        "held" if one.held else f"**missed by {100 * abs(one.found - one.bound):.1f} points**",
                        one.note,
                    )
                    for one in report.targets
                ),
            )
        )
    parts.append("Never slower:\n\n" + "\n".join(f"- {verdict}" for verdict in report.verdicts))
    notes = [f"- {row.name}: {note}" for row in report.rows for note in row.notes]
    return "\n\n".join([*parts, *(["Notes:\n\n" + "\n".join(notes)] if notes else [])])


def _seconds(row: BenchRow, name: str) -> str:
    return duration(row.phases[name]) if row.phases and name in row.phases else ""


def _cells(row: BenchRow) -> tuple[str, ...]:
    ratio = row.speedup
    return (
        row.name,
        "" if row.kind == "short" else f"{row.average_kept:.0f}",
        "" if row.flops is None else quantity(row.flops, "FLOP"),
        "" if row.prefill is None else duration(row.prefill.median),
        "" if ratio is None else times(ratio.value),
        "" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f} ({ratio.coverage:.0%}, {ratio.rounds} rounds)",
        "" if row.decode is None else duration(row.decode.median),
        "" if row.peak_bytes is None else quantity(row.peak_bytes, "B", base=1024),
        "" if row.launches is None else f"{row.launches:,}",
    )


def growth_section(found: dict[str, Any]) -> str:
    """How cost grows."""
    shapes = ", ".join(f"{name} {value}" for name, value in found["shapes"].items())
    rows = []
    for part in found["parts"]:
        tokens, batch, kept = part["tokens"], part["batch"], part["count"]
        last = tokens["rows"][-1]
        rows.append(
            (
                f"{part['kind']} `{part['name']}`",
                f"{last['point'][0]:,}",
                *(f"{tokens[f'{name} exponent']:.2f}" for name in ("work", "largest", "launches", "seconds")),
                f"{kept['work exponent']:.2f}",
                f"{batch['launches exponent']:.2f}",
                f"{last['launches']:,}",
                quantity(last["largest"], "B", base=1024),
                duration(last["seconds"]),
            )
        )
    headings = (
        "", "tokens up to", "work", "largest tensor", "launches", "seconds", "work by tokens kept",
        "launches by batch", "launches there", "largest tensor there", "seconds there",
    )  # fmt: skip
    return "\n\n".join(
        [
            "## How cost grows",
            f"`{found['command']}`: {shapes}; {found['machine']}. Exponents of N, the visual tokens of an image (1.00: "
            "in proportion), fitted from 144 tokens on. Work (FLOPs of products, one for each other number written), "
            "the largest tensor and launches are counted, seconds are of the clock. A part whose next size would need "
            "more than a GiB for one tensor, or too long, ends before it. `tests/test_bench_growth.py` holds all parts "
            "against O(kN) work and O(N) memory, and names those that grow faster.",
            table(headings, rows),
        ]
    )


def compiled_section(found: dict[str, Any]) -> str:
    """What compiling the scoring would give."""
    kernels = found["products"] + found["fused"]
    return "\n\n".join(
        [
            "## Scoring, compiled",
            f"`{found['command']}`, {found['versions']}, on a processor, a layer of `tiny-llava`: the scoring of a "
            f"stage, forward and backward, is {found['eager']} operators eager. Traced as one graph and compiled it is "
            f"{kernels} kernels: {found['products']} matrix products and {found['fused']} fused loops, with the same "
            f"saliencies. `torch.compile` around it by itself leaves {found['graphs']} graphs and {found['breaks']} "
            "breaks.",
            "It is no option of this package: the graph is made anew for each number of tokens, which differs by "
            "prompt and stage, and only an accelerator would show whether fewer kernels are worth that. Kernels on an "
            "accelerator may be fused otherwise.",
        ]
    )


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    parts = [HEAD.rstrip()]
    files = sorted(results.glob("bench-*.json"))
    parts += [bench_section(BenchReport.from_json(file.read_text(encoding="utf-8"))) for file in files]
    if not any("cuda" in file.name for file in files):
        parts.append(
            "## On an accelerator\n\nNot measured yet: no result of `python -m benchmarks.gpu` is committed, and "
            "nothing on this page says how fast an accelerator is."
        )
    compiled = results / "compiled.json"
    if compiled.is_file():
        parts.append(compiled_section(json.loads(compiled.read_text(encoding="utf-8"))))
    growth = results / "growth.json"
    if growth.is_file():
        parts.append(growth_section(json.loads(growth.read_text(encoding="utf-8"))))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
