"""`trio doctor`: what a bug report needs. Versions, what was found in transformers, and a canary for every family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DISTRIBUTION
from .common import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Distributions whose versions matter, where they are installed.
LIBRARIES = (
    DISTRIBUTION,
    "trio-vlm-zoo",
    "transformers",
    "torch",
    "torchvision",
    "accelerate",
    "peft",
    "numpy",
    "pydantic",
)


def doctor(
    family: Annotated[
        list[str] | None,
        typer.Option("--family", help="Only this family (a model_type such as llava_next); may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print versions and what was found in transformers, and try the promises on a tiny model of every family.

    Exit code 1 where a promise does not hold. Nothing is downloaded: the models are random, of a few thousand weights.
    """
    from ..core.upstream import NEWEST_TESTED
    from ..runtime.canary import is_untested
    from .common import print_json

    families = _chosen(family)
    facts: dict[str, Any] = {
        "versions": _versions(),
        "newest tested transformers": NEWEST_TESTED,
        "untested": is_untested(),
        "found": {},
        "families": {},
    }
    for name in families:
        resolved, verdict = _examine(name)
        facts["found"] = facts["found"] or resolved
        facts["families"][name] = verdict
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if any(not verdict["holds"] for verdict in facts["families"].values()):
        raise typer.Exit(1)


def _chosen(names: Sequence[str] | None) -> list[str]:
    """The families to try.

    Raises:
        UnknownNameError: one of that name is not known.
    """
    from ..adapters.find import tiny_families
    from ..errors import UnknownNameError, did_you_mean

    known = tiny_families()
    for name in names or ():
        if name not in known:
            raise UnknownNameError(
                f"--family: there is no {name!r}. {did_you_mean(name, known)}Known are {', '.join(sorted(known))}."
            )
    return sorted(known) if not names else list(dict.fromkeys(names))


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    import torch

    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return versions


def _examine(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What was resolved on a tiny model of a family, and which promises hold on it."""
    from ..errors import TrioError

    try:
        with _quiet():
            adapter = _tiny(name)
            resolved = adapter.upstream.describe()
            verdict = _sing(adapter)
    except (TrioError, ImportError) as error:
        return {}, {"holds": False, "model": name, "promises": [], "broken": "resolved", "detail": str(error)}
    promises = list(verdict.promises)
    return resolved, {
        "holds": not verdict.broken,
        "model": type(adapter.model).__name__,
        "adapter": type(adapter).__name__,
        "promises": promises,
        "broken": verdict.broken,
        "detail": verdict.said,
    }


def _tiny(name: str) -> Any:
    from ..adapters.find import adapter_for, tiny_families
    from ..core.upstream import default_model

    model, config = default_model(name)
    return adapter_for(model(tiny_families()[name].tiny_config(config)).eval())


def _sing(adapter: Any) -> Any:
    from ..runtime.canary import sing

    verdict = sing(adapter)
    assert verdict is not None  # each of these families has a tiny model
    return verdict


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .tables import console, print_table

    out = console()

    def pairs(title: str, rows: dict[str, str]) -> None:
        table = Table(title=Text(title), title_justify="left", title_style="bold", show_header=False)
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        print_table(out, table)

    tested = facts["newest tested transformers"]
    note = f" (newer than {tested}, the newest tested)" if facts["untested"] else ""
    versions = {**facts["versions"]}
    versions["transformers"] += note
    pairs("versions", versions)
    pairs("found in transformers", facts["found"])
    table = Table(title=Text("promises on tiny random models"), title_justify="left", title_style="bold")
    for column in ("family", "model", "", "detail"):
        table.add_column(column)
    for name, verdict in facts["families"].items():
        holds = Text("ok", style="green") if verdict["holds"] else Text("FAILED", style="bold red")
        detail = (
            f"{len(verdict['promises'])} promises" if verdict["holds"] else f"{verdict['broken']}: {verdict['detail']}"
        )
        table.add_row(Text(name), Text(verdict["model"]), holds, Text(detail))
    print_table(out, table)
    good = sum(verdict["holds"] for verdict in facts["families"].values())
    out.print(Text(f"the promises hold on {good} of {len(facts['families'])} families"))
