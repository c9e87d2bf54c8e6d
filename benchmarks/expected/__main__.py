"""``python -m benchmarks.expected RESULTS.json ...``: lmms-eval's numbers beside the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.expected import ROWS, average_percent, compare, measured, published, spec_of
from trio.errors import InputError, TrioError


def main(
    results: Annotated[list[Path], typer.Argument(help="*_results.json files of lmms-eval; those of a spec join.")],
    row: Annotated[
        str | None, typer.Option(help='Published row for a spec of your own: "64 tokens, without encoder/FastV".')
    ] = None,
) -> None:
    """Print what was measured beside what the paper reports for LLaVA-1.5-7B."""
    try:
        scores: dict[str, dict[str, tuple[float, str]]] = {}
        for file in results:
            found = _read(file)
            scores.setdefault(spec_of(found), {}).update(measured(found))
        for spec in scores:
            _print(spec, scores, _row(spec, row))
    except TrioError as error:
        typer.echo(f"expected: {error}", err=True)
        raise typer.Exit(2) from None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"results {str(file)!r}: cannot be read ({error}); give a *_results.json file.") from error


def _row(spec: str, row: str | None) -> tuple[str, str]:
    if spec in ROWS:
        return ROWS[spec]
    if row is None:
        raise InputError(
            f"spec {spec!r}: no row of the table is known to be its own; name one with --row 'SETTING/METHOD'."
        )
    setting, _, method = row.rpartition("/")
    return setting, method


def _print(spec: str, scores: dict[str, dict[str, tuple[float, str]]], row: tuple[str, str]) -> None:
    lines = compare(scores[spec], row)
    table = Table(title=f"{spec}: {row[1]}, {row[0]}", title_justify="left", header_style="bold")
    table.add_column("benchmark")
    for name in ("published", "measured", "difference"):
        table.add_column(name, justify="right")
    for line in lines:
        have = line.measured is not None
        table.add_row(
            line.column + ("*" if line.remark else ""),
            f"{line.published:.1f}",
            f"{line.measured:.1f}" if have else "not run",
            f"{line.measured - line.published:+.1f}" if line.measured is not None else "",
        )
    run = [line.column for line in lines if line.measured is not None and line.column in scores.get("none", {})]
    if run and spec != "none":
        table.add_section()
        theirs, all_rows = published()[row], published()
        ours = {name: value for name, (value, _) in scores[spec].items()}
        full = {name: value for name, (value, _) in scores["none"].items()}
        expected, here = average_percent(theirs, all_rows[ROWS["none"]], run), average_percent(ours, full, run)
        label = f"% of the full model, mean of {len(run)}"
        table.add_row(label, f"{expected:.1f}", f"{here:.1f}", f"{here - expected:+.1f}")
    out = Console()
    out.print(table)
    for line in lines:
        if line.remark:
            out.print(f"* {line.column}: {line.remark}")


if __name__ == "__main__":
    typer.run(main)
