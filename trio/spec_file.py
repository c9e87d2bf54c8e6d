"""Reading spec files: YAML through `safe_load`, JSON, and the line of every key for messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trio.errors import SpecError
from trio.spec_text import path, short

__all__ = ["read_spec_file"]

MAX_BYTES = 1 << 20  # a spec is a page of text; anything larger is some other file


def read_spec_file(file: Path, origin: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """The data of a YAML or JSON file, and the 1-based line of every key and item.

    Args:
        file: what to read.
        origin: what messages call it.

    Raises:
        SpecError: the file cannot be read, is no mapping, holds tags, duplicate keys or no version.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise SpecError(f"{origin}: {size} bytes is no spec (at most {MAX_BYTES}); give a YAML file.")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"{origin}: cannot be read ({error.strerror or error}); check the path and its rights."
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{origin}: not UTF-8 text (byte {error.start}); save the file as UTF-8.") from error
    lines: dict[tuple[str | int, ...], int] = {}
    if file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(
                f"{origin}, line {error.lineno}: not valid JSON: {error.msg}.", line=error.lineno
            ) from error
        text = text.replace("\t", " ")  # the YAML reader, which gives the lines, refuses tabs
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _map_lines(node, (), lines, origin, ())
        if file.suffix != ".json":
            data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _yaml_error(error, origin) from error
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"{type(data).__name__} {short(data)}"
        raise SpecError(
            f"{origin}: found {found}; a spec is a mapping of keys such as version, name and stages. `trio show "
            "trio-soft-11 "
            "--yaml` prints one to start from."
        )
    if "version" not in data:
        raise SpecError(f"{origin}, line 1, version: missing; add `version: 1`.", place="version", line=1)
    return data, lines


def _yaml_error(error: Exception, origin: str) -> SpecError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    where = f"{origin}, line {line}" if line else origin
    problem = str(getattr(error, "problem", None) or error)
    if isinstance(error, yaml.constructor.ConstructorError) and "tag" in problem:
        return SpecError(f"{where}: {problem}; a spec holds plain values only. Remove the tag.", line=line)
    context = getattr(error, "context", None)
    detail = f"{context}: {problem}" if context else problem
    return SpecError(f"{where}: not valid YAML: {detail}. Check indentation, quotes and brackets there.", line=line)


def _map_lines(
    node: yaml.Node,
    place: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    origin: str,
    above: tuple[int, ...],
) -> None:
    """Fill in the 1-based line of every key and item; refuse duplicate keys and aliases into themselves."""
    here = node.start_mark.line + 1
    lines.setdefault(place, here)
    if id(node) in above:
        raise SpecError(f"{origin}, line {here}: an alias refers to itself; write the values out.", line=here)
    if len(above) > 20 or len(lines) > 10_000:
        raise SpecError(f"{origin}, line {here}: nested too deeply, or too many values for a spec.", line=here)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise SpecError(
                    f"{origin}, line {line}, {path((*place, name))}: the key is there twice; remove one.",
                    place=path((*place, name)),
                    line=line,
                )
            seen.add(name)
            lines[(*place, name)] = line
            _map_lines(value, (*place, name), lines, origin, (*above, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _map_lines(item, (*place, index), lines, origin, (*above, id(node)))
