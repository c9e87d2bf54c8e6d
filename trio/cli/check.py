"""`trio check`: the promises of the runtime on a checkpoint of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Device, DType, DTypeName, Json, ModelArgument

if TYPE_CHECKING:
    from ..testing import CheckResults


def check(
    model: ModelArgument,
    promise: Annotated[
        list[str] | None, typer.Option("--promise", help="Only this promise; may be repeated. Default: all.")
    ] = None,
    dtype: DTypeName = DType.float32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every promise of the runtime on a model; exit code 1 where one does not hold."""
    from ..testing import check_adapter
    from .common import load_model, print_json

    network, processor = load_model(model, dtype=dtype.value, device=device)
    results = check_adapter(network, processor, promises=promise, raise_on_failure=False)
    if as_json:
        print_json(
            {
                "model": model,
                "passed": results.passed,
                "checks": [
                    {
                        "promise": one.promise,
                        "name": one.name,
                        "passed": one.passed,
                        "detail": one.detail,
                        "seconds": one.seconds,
                    }
                    for one in results
                ],
            }
        )
    else:
        _print(model, results)
    if not results.passed:
        raise typer.Exit(1)


def _print(model: str, results: CheckResults) -> None:
    import textwrap

    from rich.table import Table
    from rich.text import Text

    from .tables import console, print_table

    out = console()
    table = Table(title=Text(f"promises on {model}"), title_justify="left", title_style="bold", header_style="bold")
    for name in ("check", "", "promise", "detail"):
        table.add_column(name)
    for one in results:
        verdict = Text("ok", style="green") if one.passed else Text("FAILED", style="bold red")
        detail = textwrap.shorten(one.detail, 90, placeholder=" ...") if one.passed else one.detail
        table.add_row(Text(one.name), verdict, Text(one.promise), Text(detail))
    print_table(out, table)
    out.print(Text(f"{len(results) - len(results.failures)} of {len(results)} checks hold"))
