"""The messages of spec errors: paths such as `stages[1].keep`, and pydantic's problems as sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import SpecError, TrioError, did_you_mean

__all__ = ["Lines", "Wrong", "at", "line_of", "path", "short", "steps", "translate"]

MAX_PROBLEMS = 20  # that one message lists
Lines = Mapping[tuple[str | int, ...], int]


class Wrong(ValueError):
    """A problem found by our own validators: a complete sentence, and optionally the path below the model."""

    def __init__(self, message: str, spec_path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.spec_path = spec_path


def path(spec_path: Sequence[str | int]) -> str:
    """A path as text: ("stages", 1, "keep") -> "stages[1].keep"."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in spec_path)
    return text.removeprefix(".")


def short(value: object) -> str:
    """A value as a message shows it: its repr, cut to 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of levels
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _problem_at(problem: Any, root: type[BaseModel]) -> tuple[tuple[str | int, ...], str]:
    """Where a pydantic problem is, and what it says."""
    spec_path: tuple[str | int, ...] = tuple(problem["loc"])
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, Wrong):
        return spec_path + error.spec_path, str(error)
    model, field = _field(root, spec_path)
    if problem["type"] == "extra_forbidden":
        known = list(model.model_fields)
        key = str(spec_path[-1])
        return spec_path, f"unknown key {key!r}. {did_you_mean(key, known)}Allowed: {', '.join(known)}."
    help_ = f" Allowed: {field}." if field else ""
    if problem["type"] == "missing":
        return spec_path, f"missing; add it.{help_}"
    return spec_path, f"found {short(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}.{help_}"


def _field(root: type[BaseModel], spec_path: Sequence[str | int]) -> tuple[type[BaseModel], str]:
    """The model that holds the last step of a path, and that field's description."""
    model = root
    names = [step for step in spec_path if isinstance(step, str)]
    for name in names[:-1]:
        info = model.model_fields.get(name)
        inner = [] if info is None else [info.annotation, *get_args(info.annotation)]
        model = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), model)
    info = model.model_fields.get(names[-1]) if names else None
    return model, (info.description or "") if info is not None else ""


def translate(
    error: ValidationError,
    root: type[BaseModel],
    origin: str = "",
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> SpecError:
    """Pydantic's problems with `root` as one `SpecError`, a sentence each, with file, line and spec path."""
    sentences: list[str] = []
    first: tuple[str, int | None] | None = None
    # A misspelt key is also a missing one: say the misspelling first.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    for problem in problems[:MAX_PROBLEMS]:
        spec_path, text = _problem_at(problem, root)
        line = line_of(spec_path, lines)
        where = ", ".join(part for part in (origin, f"line {line}" if line else "", path(spec_path)) if part)
        sentences.append(f"{where}: {text}" if where else text)
        first = first or (path(spec_path), line)
    if len(problems) > MAX_PROBLEMS:
        sentences.append(f"And {len(problems) - MAX_PROBLEMS} more.")
    first_path, line = first or ("", None)
    return SpecError(" ".join(sentences), spec_path=first_path, line=line)


def line_of(spec_path: Sequence[str | int], lines: Lines | None) -> int | None:
    """The line of a spec path, or of the nearest one around it that has a line."""
    if lines is None:
        return None
    for size in range(len(spec_path), 0, -1):
        line = lines.get(tuple(spec_path[:size]))
        if line is not None:
            return line
    return lines.get(())


def at(error: TrioError, spec_path: str, line: int | None = None, origin: str = "") -> TrioError:
    """The same error with its spec path (and line and file) in front."""
    where = ", ".join(part for part in (origin, f"line {line}" if line else "", spec_path) if part)
    message = f"{where}: {error}" if where else str(error)
    return SpecError(message, spec_path=spec_path, line=line) if isinstance(error, SpecError) else type(error)(message)


def steps(spec_path: str) -> tuple[str | int, ...]:
    """The inverse of `path`: "stages[1].keep" -> ("stages", 1, "keep")."""
    return tuple(int(step) if step.isdigit() else step for step in re.findall(r"\w+", spec_path))
