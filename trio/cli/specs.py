"""`trio validate` and `trio schema`: spec files, for people and for editors."""

from __future__ import annotations

from typing import Annotated

import typer


def validate(
    files: Annotated[list[str], typer.Argument(help="Spec files, or names of shipped specs.", metavar="FILE...")],
) -> None:
    """Check spec files, the parameters of their parts included; exit code 2 where one is wrong."""
    from ..errors import TrioError
    from ..spec import load_spec
    from .common import say

    wrong = 0
    for file in files:
        try:
            spec = load_spec(file)
        except TrioError as error:
            wrong += 1
            say(f"trio: {' '.join(str(error).split())}", err=True)
        else:
            what = [*(["a compressor"] if spec.compressor is not None else []), f"{len(spec.stages)} stages"]
            say(f"{file}: ok ({spec.name}: {' and '.join(what)})")
    if wrong:
        raise typer.Exit(2)


def schema() -> None:
    """Print the JSON schema of spec files, with the names of all installed parts, for editors."""
    from ..spec import PipelineSpec
    from .common import print_json

    print_json(PipelineSpec.json_schema(parts=True))
