"""`trio list`: the parts, the specs and the models of the zoo, a line each, or one of them with all that is known."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..registry import PartInfo

#: Kinds in the order in which they are listed; the singular is a name for them too.
KINDS = ("scorers", "selectors", "compressors", "adapters", "towers", "specs", "models")
Entries = dict[str, list[dict[str, Any]]]


def list_parts(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"A kind ({', '.join(KINDS)}), a name, a pattern such as '*vision*', or a kind and one of the others.",
            metavar="[KIND] [NAME]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List scorers, selectors, compressors, adapters, towers, specs and zoo models; a NAME shows all about it."""
    from .common import print_json

    kinds, pattern = _asked(what or [])
    by_kind = {kind: _entries(kind, pattern) for kind in kinds}
    plain = pattern is not None and not any(sign in pattern for sign in "*?[")
    if plain and not any(by_kind.values()):
        _refuse(pattern or "", kinds)
    if pattern is not None and len(kinds) > 1:
        by_kind = {kind: entries for kind, entries in by_kind.items() if entries}
    if as_json:
        print_json(by_kind)
        return
    from .tables import console

    (_print_texts if plain else _print_lines)(console(), by_kind)


def _asked(words: list[str]) -> tuple[tuple[str, ...], str | None]:
    """The kinds, and the name or pattern, that the words ask for.

    Raises:
        InputError: there are too many words, or two of one sort.
    """
    from ..errors import InputError, did_you_mean

    named = {word: kind for kind in KINDS for word in (kind, kind.removesuffix("s"))}
    if len(words) == 2 and words[0] not in named:
        raise InputError(
            f"list {words[0]!r}: there is no such kind. {did_you_mean(words[0], KINDS)}Known are {', '.join(KINDS)}."
        )
    if len(words) > 2:
        raise InputError(f"list: found {len(words)} words; give at most a kind and a name, as in `trio list specs x`.")
    if words and words[0] in named:
        return (named[words[0]],), words[1] if len(words) == 2 else None
    return KINDS, words[0] if words else None


def _refuse(name: str, kinds: tuple[str, ...]) -> None:
    """Says that nothing has this name.

    Raises:
        UnknownNameError: always.
    """
    from ..errors import UnknownNameError, did_you_mean

    known = [entry["name"] for kind in kinds for entry in _entries(kind, None)]
    words = [*known, *KINDS] if len(kinds) > 1 else known
    where = "kind, part, spec or model" if len(kinds) > 1 else kinds[0].removesuffix("s")
    raise UnknownNameError(
        f"list {name!r}: there is no such {where}. {did_you_mean(name, words)}`trio list` shows all names."
    )


def _entries(kind: str, pattern: str | None) -> list[dict[str, Any]]:
    """The entries of a kind whose name or alias matches."""
    from ..adapters.base import ADAPTERS
    from ..encoders.compressors.base import COMPRESSORS
    from ..encoders.towers.base import TOWERS
    from ..scorers.base import SCORERS
    from ..selectors.base import SELECTORS

    registries: dict[str, Any] = {
        "scorers": SCORERS,
        "selectors": SELECTORS,
        "compressors": COMPRESSORS,
        "adapters": ADAPTERS,
        "towers": TOWERS,
    }
    if kind in registries:
        entries = [_part(registries[kind].describe(name)) for name in registries[kind].names()]
    else:
        entries = _specs() if kind == "specs" else _models()
    return [
        entry
        for entry in entries
        if pattern is None or any(fnmatch(name, pattern) for name in (entry["name"], *entry.get("aliases", ())))
    ]


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


def _specs() -> list[dict[str, Any]]:
    from ..spec import load_spec, shipped_specs

    specs = [load_spec(name, check_parts=False) for name in shipped_specs()]
    return [{"name": spec.name, "source": spec.source, "summary": spec.description} for spec in specs]


def _models() -> list[dict[str, Any]]:
    from .. import zoo

    return [
        {"name": name, "source": str(zoo.path(name)), "summary": "a trained model of the zoo"} for name in zoo.names()
    ]


def _print_lines(out: Console, by_kind: Entries) -> None:
    """A line an entry, cut at the width of the console."""
    from rich.text import Text

    for number, (kind, entries) in enumerate(by_kind.items()):
        if number:
            out.print()
        out.print(Text(kind if entries else f"{kind}: none", style="bold"))
        width = max((len(entry["name"]) for entry in entries), default=0)
        for entry in entries:
            line = Text(f"  {entry['name']:<{width}}  ", style="red" if entry.get("broken") else "")
            line.append_text(_in_short(entry))
            line.truncate(out.width, overflow="ellipsis")
            out.print(line, no_wrap=True)


def _in_short(entry: dict[str, Any]) -> Text:
    """What an entry is, on one line; plugins with their source."""
    from rich.text import Text

    if entry.get("broken"):
        return Text(f"broken: {entry['broken']}")
    plugin = "parameters" in entry and entry["source"] != "trio"
    return Text(f"[{entry['source']}] {entry['summary']}" if plugin else entry["summary"])


def _print_texts(out: Console, by_kind: Entries) -> None:
    """Everything about each entry."""
    from rich.padding import Padding
    from rich.text import Text

    for number, (kind, entry) in enumerate((kind, entry) for kind, entries in by_kind.items() for entry in entries):
        if number:
            out.print()
        out.print(Text(f"{kind.removesuffix('s')} {entry['name']}", style="bold"))
        if entry.get("aliases"):
            out.print(Text(f"also called {', '.join(entry['aliases'])}"))
        if entry.get("broken"):
            out.print(Text(f"broken: {entry['broken']}", style="red"))
        for line in (entry["summary"], entry["source"] and f"source: {entry['source']}"):
            if line:
                out.print(Text(line))
        for name, one in entry.get("parameters", {}).items():
            default = "required" if one["default"] is None else f"default {one['default']}"
            out.print(Text(f"{name} ({one['type']}, {default})"), style="dim")
            if one["description"]:
                out.print(Padding(Text(one["description"]), (0, 0, 0, 2), expand=False))
