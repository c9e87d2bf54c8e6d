"""The command line `trio`: run, list, show, validate, schema, check, doctor, fidelity, tune, calibrate, bench and more.

Modules of this package import nothing heavy at the top, so that `trio --help` answers at once; every command imports
what it needs when it runs.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import TrioError
from .batch import batch
from .bench import bench
from .calibrate import calibrate
from .check import check
from .common import say
from .doctor import doctor
from .eval import evaluate
from .export_embeds import export_embeds
from .fidelity import fidelity
from .listing import list_parts
from .run import run
from .show import show
from .specs import schema, validate
from .tune import tune

__all__ = ["app"]


class _Group(TyperGroup):
    """Turns every error that the package raises on purpose into one paragraph on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrioError as error:
            say(f"trio: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="trio",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fewer visual tokens for vision-language models, on stock transformers.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"trio-vlm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fewer visual tokens for vision-language models, on stock transformers."""
    package = importlib.import_module("..", __package__)
    if "_LAZY" not in vars(package):  # the async library of the same import name was installed over this package
        typer.echo(
            "trio: the async library 'trio' has overwritten trio-vlm in this environment; both own the folder "
            "site-packages/trio. Make a fresh environment and install there only trio-vlm, or both trio and "
            "trio-vlm-alias, which is imported as trio_vlm.",
            err=True,
        )
        raise typer.Exit(2)


app.command("run")(run)
app.command("list")(list_parts)
app.command("show")(show)
app.command("validate")(validate)
app.command("schema")(schema)
app.command("check")(check)
app.command("doctor")(doctor)
app.command("eval")(evaluate)
app.command("fidelity")(fidelity)
app.command("tune")(tune)
app.command("calibrate")(calibrate)
app.command("bench")(bench)
app.command("batch")(batch)
app.command("export-embeds")(export_embeds)
