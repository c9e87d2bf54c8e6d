"""`trio check`: the promises of the runtime on a checkpoint of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import DType

if TYPE_CHECKING:
    from ..testing import Results


def check(
    model: Annotated[str, typer.Argument(help="Zoo model, folder or hub name.")],
    promise: Annotated[
        list[str] | None, typer.Option("--promise", help="Only this promise; may be repeated. Default: all.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of the weights.")] = DType.float32,
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
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


def _print(model: str, results: Results) -> None:
    import textwrap

    from rich.table import Table
    from rich.text import Text

    from .common import console

    out = console()
    table = Table(title=Text(f"promises on {model}"), title_justify="left", title_style="bold", header_style="bold")
    for name in ("promise", "check", "", "detail"):
        table.add_column(name)
    before = ""
    for one in results:
        verdict = Text("ok", style="green") if one.passed else Text("FAILED", style="bold red")
        detail = textwrap.shorten(one.detail, 90, placeholder=" ...") if one.passed else one.detail
        table.add_row(Text(one.promise if one.promise != before else ""), Text(one.name), verdict, Text(detail))
        before = one.promise
    out.print(table)
    out.print(Text(f"{len(results) - len(results.failures)} of {len(results)} checks hold"))
