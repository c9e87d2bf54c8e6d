"""JSON lines: one reader and one writer for all files that hold an object a line.

A line ends at a line feed and nowhere else: U+2028 and its kind are text within JSON strings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..core.files import read_plain_lines, sync_folder
from ..errors import InputError
from ..spec.messages import short

__all__ = ["Line", "append_lines", "cut_lines", "read_lines"]

T = TypeVar("T")
_BOM = b"\xef\xbb\xbf"
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


@dataclass(frozen=True)
class Line(Generic[T]):
    """One line.

    Attributes:
        value: what it holds.
        number: in the file, from 1.
        end: bytes of the file up to its end.
    """

    value: T
    number: int
    end: int


def read_lines(file: Path, shape: TypeAdapter[T], *, what: str, form: str, torn: bool = False) -> Iterator[Line[T]]:
    """The objects of a file, line by line; empty lines are left out.

    Args:
        file: the file.
        shape: what each line has to be.
        what: what messages call the file.
        form: a sentence that says what a line looks like; messages end with it.
        torn: a last line without its line feed is left out: the process ended while it wrote.

    Raises:
        InputError: the file cannot be read, or a line is no such object; the message has the line.
    """
    name = f"{what} {str(file)!r}"
    lines = read_plain_lines(file, name, "give a file with one JSON object a line.")
    end = 0
    for number, line in enumerate(lines, start=1):
        if torn and not line.endswith(b"\n"):
            return
        end += len(line)
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.strip():
            continue
        try:
            value = shape.validate_json(text)
        except ValidationError as error:
            raise InputError(f"{name}, line {number}: {_problem(error)}; {form}") from None
        yield Line(value, number, end)


def append_lines(file: Path, shape: TypeAdapter[T], values: Sequence[T]) -> None:
    """Appends a line each; when this returns, they survive the end of the process and of the machine.

    Raises:
        InputError: they cannot be written; the file is then as it was.
    """
    data = b"".join(shape.dump_json(value) + b"\n" for value in values)
    new = not file.exists()
    begin = 0 if new else file.stat().st_size
    try:
        with file.open("ab") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        cut_lines(file, begin)
        raise InputError(f"{str(file)!r}: cannot be written ({error.strerror or error}); make room for it.") from error
    if new:
        sync_folder(file.parent)


def cut_lines(file: Path, end: int) -> None:
    """Drops what stands after so many bytes."""
    with suppress(FileNotFoundError):
        if file.stat().st_size > end:
            os.truncate(file, end)


def _problem(error: ValidationError) -> str:
    """The first problem of a line; values are shown only once the line is known to be an object."""
    # A misspelt key is also a missing one: say the misspelling first.
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] not in _UNKNOWN)
    first: Any = problems[0]
    kind, place = first["type"], ".".join(map(str, first["loc"][:1]))
    if kind == "json_invalid":
        said = re.sub(r" at line \d+ column (\d+)$", r", column \1", first["msg"].removeprefix("Invalid JSON: "))
        return f"no JSON ({said})"
    if not place:
        return f"found {type(first['input']).__name__}, not an object"
    if kind == "missing":
        return f"{place!r} is missing"
    if kind in _UNKNOWN:
        return f"unknown key {short(place)}"
    return f"{place!r}: found {short(first['input'])}"
