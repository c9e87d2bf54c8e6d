"""`trio list`: the parts, the specs and the models of the zoo, with their source."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..registry import PartInfo


class Kind(StrEnum):
    """What can be listed."""

    all = "all"
    scorers = "scorers"
    selectors = "selectors"
    compressors = "compressors"
    adapters = "adapters"
    towers = "towers"
    specs = "specs"
    models = "models"


def list_parts(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.all,
    pattern: Annotated[str, typer.Option("--name", help='Only names that match, for example "*visionzip*".')] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List scorers, selectors, compressors, adapters, vision towers, specs and zoo models."""
    from fnmatch import fnmatch

    from .. import zoo
    from ..adapters.base import ADAPTERS
    from ..encoders.compressors.base import COMPRESSORS
    from ..encoders.towers.base import TOWERS
    from ..scorers.base import SCORERS
    from ..selectors.base import SELECTORS
    from ..spec import load_spec, shipped_specs
    from .common import print_json

    registries: dict[str, Any] = {
        "scorers": SCORERS,
        "selectors": SELECTORS,
        "compressors": COMPRESSORS,
        "adapters": ADAPTERS,
        "towers": TOWERS,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, registry in registries.items():
        if kind in (Kind.all, name):
            found[name] = [_part(registry.describe(part)) for part in registry.names(pattern)]
    if kind in (Kind.all, Kind.specs):
        specs = [load_spec(name, check_parts=False) for name in shipped_specs() if fnmatch(name, pattern)]
        found["specs"] = [{"name": s.name, "source": s.source, "summary": s.description} for s in specs]
    if kind in (Kind.all, Kind.models):
        names = [name for name in zoo.names() if fnmatch(name, pattern)]
        found["models"] = [
            {"name": name, "source": str(zoo.path(name)), "summary": "trained, in the zoo"} for name in names
        ]
    if as_json:
        print_json(found)
    else:
        _print(found)


def _part(info: PartInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "aliases": list(info.aliases),
        "source": info.source,
        "summary": info.summary,
        "parameters": {
            one.name: {"type": one.type, "default": one.default, "description": one.description}
            for one in info.parameters
        },
        "broken": info.broken or None,
    }


def _print(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .common import console

    out = console()
    for kind, rows in found.items():
        if not rows:
            out.print(Text(f"{kind}: none"), style="dim")
            continue
        table = Table(title=kind, title_justify="left", title_style="bold", header_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("what it does")
        table.add_column("source")
        for row in rows:
            if row.get("broken"):
                what = Text(f"broken: {row['broken']}", style="red")
            else:
                what = Text(row["summary"])
                defaults = [
                    name if one["default"] is None else f"{name}={one['default']}"
                    for name, one in row.get("parameters", {}).items()
                ]
                if defaults:
                    what.append(f"\n{', '.join(defaults)}", style="dim")
            name = " = ".join([row["name"], *row.get("aliases", [])])
            table.add_row(Text(name), what, Text(row["source"]))
        out.print(table)
