"""Reading spec files: YAML, JSON, and the line of every key for messages.

A file comes from anywhere, or is another file altogether: it is read within bounds, and no message quotes one that does
not say `version`, as a spec has to.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ..core.files import read_plain
from ..errors import SpecError
from .messages import path
from .reading import MAX_DEPTH, MAX_VALUES, compose, construct

__all__ = ["read_spec_file"]

MAX_BYTES = 1 << 20  # a spec is a page of text; anything larger is some other file
START = "`trio show trio-soft-11 --yaml` prints one to start from."


def read_spec_file(file: Path, origin: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """The data of a YAML or JSON file, and the 1-based line of every key and item.

    Args:
        file: what to read.
        origin: what messages call it.

    Raises:
        SpecError: the file cannot be read, is no mapping, holds tags, duplicate keys or no version, or is too large.
    """
    remedy = "check the path and its rights; a spec is a text file of at most 1 MiB."
    data = read_plain(file, origin, remedy, most=MAX_BYTES, error=SpecError)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{origin}: not UTF-8 text (byte {error.start}); save the file as UTF-8.") from error
    is_json = file.suffix == ".json"
    mapping = _json(text, origin) if is_json else None
    try:
        # The YAML reader gives the lines of JSON too; it refuses tabs.
        root = compose(text.replace("\t", " ") if is_json else text)
        _check_root(root, origin)
        assert root is not None
        lines: dict[tuple[str | int, ...], int] = {}
        _map_lines(root, (), lines, origin, ())
        return mapping if is_json else construct(root), lines
    except (yaml.YAMLError, ValueError) as error:
        raise _yaml_error(error, origin, text) from error


def _json(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{origin}, line {error.lineno}: not valid JSON: {error.msg}.", line=error.lineno) from error
    except ValueError as error:
        raise SpecError(f"{origin}: a number has too many digits; write a smaller one.") from error
    except RecursionError as error:
        raise SpecError(f"{origin}: nested too deeply for a spec. {START}") from error


def _check_root(root: yaml.Node | None, origin: str) -> None:
    """Refuse what was never a spec, without a word of what it holds."""
    if not isinstance(root, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "text that is no mapping"}
        kind = "an empty file" if root is None else kinds[type(root)]
        raise SpecError(
            f"{origin}: found {kind}; a spec is a mapping of keys such as version, name and stages. {START}"
        )
    version = next((value for key, value in root.value if key.value == "version"), None)
    if version is None:
        raise SpecError(f"{origin}, line 1, version: missing; add `version: 1`.", spec_path="version", line=1)
    if version.value != "1":
        line = version.start_mark.line + 1
        raise SpecError(
            f"{origin}, line {line}, version: found another one than 1; a spec of this format says `version: 1`.",
            spec_path="version",
            line=line,
        )


def _yaml_error(error: Exception, origin: str, text: str) -> SpecError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    where = f"{origin}, line {line}" if line else origin
    if isinstance(error, yaml.constructor.ConstructorError) and "tag" in str(error.problem):
        return SpecError(f"{where}: a spec holds plain values only. Remove the tag.", line=line)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    context = getattr(error, "context", None)
    detail = f": {context}: {problem}" if context else f": {problem}"
    if re.search(r"""^[\s{]*["']?version["']?\s*:""", text, re.MULTILINE) is None:
        detail = ""  # the parser quotes what it stumbles over, and this need not be a spec
    return SpecError(f"{where}: not valid YAML{detail}. Check indentation, quotes and brackets there.", line=line)


def _map_lines(
    node: yaml.Node,
    spec_path: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    origin: str,
    above: tuple[int, ...],
) -> None:
    """Fill in the 1-based line of every key and item; refuse duplicate keys and aliases into themselves."""
    here = node.start_mark.line + 1
    lines.setdefault(spec_path, here)
    if id(node) in above:
        raise SpecError(f"{origin}, line {here}: an alias refers to itself; write the values out.", line=here)
    if len(above) > MAX_DEPTH or len(lines) > MAX_VALUES:  # aliases multiply what the reader counted once
        raise SpecError(f"{origin}, line {here}: nested too deeply, or too many values for a spec.", line=here)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError(f"{origin}, line {line}: a key is a list or a mapping; keys are names.", line=line)
            name = str(key.value)
            if name in seen:
                raise SpecError(
                    f"{origin}, line {line}, {path((*spec_path, name))}: the key is there twice; remove one.",
                    spec_path=path((*spec_path, name)),
                    line=line,
                )
            seen.add(name)
            lines[(*spec_path, name)] = line
            _map_lines(value, (*spec_path, name), lines, origin, (*above, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _map_lines(item, (*spec_path, index), lines, origin, (*above, id(node)))
