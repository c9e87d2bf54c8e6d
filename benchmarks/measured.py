"""What the commands print, in the pages that explain them, from committed results.

``python -m benchmarks.measured`` puts the tables of `trio fidelity`, `trio tune` and `trio calibrate` into their pages,
draws the plot of the search beside docs/tune.md, and puts what half precision changes into docs/testing.md.
The pages say how the results were made.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks.tables import write_block

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def fidelity(out: Console) -> None:
    """The table of `trio fidelity`."""
    from trio.cli.fidelity import print_report
    from trio.measure.fidelity import FidelityReport

    print_report(FidelityReport.from_json((RESULTS / "fidelity-tiny-llava.json").read_text()), out)


def fidelity_long(out: Console) -> None:
    """The same for long answers."""
    from trio.cli.fidelity import print_report
    from trio.measure.fidelity import FidelityReport

    print_report(FidelityReport.from_json((RESULTS / "fidelity-long-tiny-llava.json").read_text()), out)


def tune(out: Console) -> None:
    """What `trio tune` prints; `main` draws its plot beside the page."""
    from trio.cli.tune import print_report
    from trio.measure.tuning import TuningReport

    print_report(TuningReport.from_json((RESULTS / "tune-tiny-llava.json").read_text()), out)


def calibrate(out: Console) -> None:
    """What `trio calibrate` prints."""
    from trio.cli.calibrate import print_report
    from trio.measure.calibration import CalibrationReport

    print_report(CalibrationReport.from_json((RESULTS / "calibrate-tiny-llava.json").read_text()), out)


def curves(out: Console) -> None:
    """The drop-all curves of all models that were calibrated, side by side, and what came out."""
    from rich.table import Table

    from trio.measure.calibration import CalibrationReport

    reports = [CalibrationReport.from_json(file.read_text()) for file in sorted(RESULTS.glob("calibrate-*.json"))]
    table = Table(
        title="KL, and what is taken in up to here", title_justify="left", title_style="", header_style="bold"
    )
    for column in ("after layer", *(report.model for report in reports)):
        table.add_column(column, justify="right", no_wrap=True)
    for depth in range(max(len(report.curve.points) for report in reports)):
        points = [report.curve.points[depth : depth + 1] for report in reports]
        cells = ["".join(f"{one.kl.mean:.3f} {one.absorbed:4.0%}" for one in point) for point in points]
        table.add_row(str(depth), *cells)
    out.print(table)
    for report in reports:
        out.print(f"{report.model}, {report.budget}:")
        for line in report.verdict():
            out.print(f"  {line}")


def reuse(out: Console) -> None:
    """The table of `benchmarks.reuse`, and what is computed again for every spec."""
    from benchmarks.reuse import RESULT, lines, table

    data = json.loads(RESULT.read_text())
    out.print(table(data))
    for line in lines(data):
        out.print(line)


def testing(out: Console) -> None:
    """The tables of `benchmarks.half`."""
    from benchmarks.half import RESULT, answer_table, table

    found = json.loads(RESULT.read_text())
    out.print(table(found), answer_table(found))


def plot(file: Path) -> None:
    """Draws the plot of `trio tune`."""
    from trio.measure.tuning import TuningReport
    from trio.measure.tuning.plot import draw

    draw(TuningReport.from_json((RESULTS / "tune-tiny-llava.json").read_text()), file)


PAGES: dict[str, Callable[[Console], None]] = {
    "reuse": reuse,
    "fidelity": fidelity,
    "fidelity-long": fidelity_long,
    "tune": tune,
    "calibrate": calibrate,
    "curves": curves,
    "testing": testing,
}
#: Blocks that stand on the page of another.
ELSEWHERE = {"reuse": "fidelity", "fidelity-long": "fidelity", "curves": "calibrate"}


def block(name: str) -> str:
    """The measured block of a page, with the lines that mark it."""
    with Console(width=100, record=True, file=io.StringIO(), highlight=False) as out:
        PAGES[name](out)
    begin, end = marks(name)
    lines = [line.rstrip() for line in out.export_text(styles=False).splitlines()]
    return "\n".join([begin, "", "```text", *lines, "```", "", end])


def marks(name: str) -> tuple[str, str]:
    """The lines before and after the block of a page."""
    return f"<!-- measured: python -m benchmarks.measured ({name}) -->", "<!-- end of what was measured -->"


def main() -> None:
    """Writes the blocks into the pages."""
    for name in PAGES:
        write_block(ROOT / "docs" / f"{ELSEWHERE.get(name, name)}.md", block(name))
    plot(ROOT / "docs" / "tune-tiny-llava.png")


if __name__ == "__main__":
    main()
