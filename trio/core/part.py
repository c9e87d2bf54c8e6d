"""The base of every part: a small frozen class whose fields are its validated parameters."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SpecError, did_you_mean
from .shape import ModelShape

__all__ = [
    "Categorical",
    "Choice",
    "FloatRange",
    "IntRange",
    "Part",
    "described_parameters",
    "explain",
    "type_name",
]

#: What opens the section of a class's docstring that describes its parameters.
_SECTION = re.compile(r"^(?:Parameters|Args|Arguments):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+)(?: \([^)]*\))?: *(.*)$")


@dataclass(frozen=True)
class Categorical:
    """Values of a parameter that a search may try.

    Attributes:
        options: at least one.
        later: the value in every stage behind the first; None: the one of the first stage.
    """

    options: tuple[str | int | float | bool, ...]
    later: str | int | float | bool | None = None


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from `low` to `high`; `later` as in `Categorical`."""

    low: int
    high: int
    later: int | None = None


@dataclass(frozen=True)
class FloatRange:
    """Numbers from `low` to `high`, rounded to `digits`; `later` as in `Categorical`."""

    low: float
    high: float
    digits: int = 2
    later: float | None = None


Choice = Categorical | IntRange | FloatRange


class Part(BaseModel):
    """Base of `Scorer`, `Selector` and `Compressor`.

    The class fields of a part are its parameters, with their types, ranges and defaults; an unknown or a wrong one is
    refused when the part is made. What they mean stands once, under ``Parameters:`` in the docstring of the class;
    listings and schemas read it there (or from ``Field(description=...)``). Parts are frozen: what a run needs to
    remember belongs to the runtime, not here, so one object can serve any number of models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    def __init__(self, **params: Any) -> None:
        """Validate the parameters.

        Raises:
            SpecError: a parameter is unknown, missing or wrong; the message names it and the allowed ones.
        """
        try:
            super().__init__(**params)
        except ValidationError as error:
            raise SpecError(explain(type(self).__name__, type(self), error)) from error

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Gives the fields the descriptions that the docstring has for them."""
        super().__pydantic_init_subclass__(**kwargs)
        bases = [one.model_fields for one in cls.__mro__[1:] if issubclass(one, Part)]
        changed = False
        for name, said in described_parameters(cls.__dict__.get("__doc__") or "").items():
            field = cls.model_fields.get(name)
            inherited = next((fields[name].description for fields in bases if name in fields), None)
            if field is not None and field.description in (None, inherited):
                field.description, changed = said, True
        if changed and cls.__pydantic_complete__:  # else what validates and describes it is not built yet
            cls.model_rebuild(force=True)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int | None:
        """FLOPs of one call of this part, by the conventions of `trio.core.flops`; None (the default): not known.

        Args:
            shape: the model.
            tokens: rows of one sample that reach the stage, text and visual; for a compressor those of the image.
            visual: visual tokens that reach it: of the sample (scorer), of the group (selector) or of the image
                (compressor, whose reading of the tower is counted by what `reads` names and does not belong here).
            keep: how many of those are kept.
        """
        return None

    @classmethod
    def search_space(cls) -> Mapping[str, Choice] | None:
        """Parameters that a search varies, with their values; by default none, so that all keep their defaults.

        None: the part is no candidate, because it is a floor that methods are compared with.
        """
        return {}


def explain(label: str, cls: type[Any], error: ValidationError) -> str:
    """One paragraph that says which parameters of the part `label` are wrong, and which are allowed."""
    known = {name: type_name(info.annotation) for name, info in getattr(cls, "model_fields", {}).items()}
    sentences = []
    for problem in error.errors():
        parameter_path = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown parameter {parameter_path!r}. {did_you_mean(parameter_path, known)}".strip())
        elif problem["type"] == "missing":
            sentences.append(f"the parameter {parameter_path!r} is missing; give it.")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"{parameter_path + ': ' if parameter_path else ''}found {problem['input']!r}; {text}.")
    allowed = ", ".join(f"{name} ({kind})" for name, kind in known.items()) or "none: it has no parameters"
    return f"{label}: {' '.join(sentences)} Allowed parameters: {allowed}."


def described_parameters(docstring: str) -> dict[str, str]:
    """What a docstring says about each parameter, on one line each, by name."""
    section = _SECTION.search(inspect.cleandoc(docstring) + "\n")
    descriptions: dict[str, list[str]] = {}
    entry: list[str] = []
    for line in textwrap.dedent(section[1] if section else "").splitlines():
        begins = _ENTRY.match(line)
        if begins:
            entry = descriptions.setdefault(begins[1], [])
        entry.append(begins[2] if begins else line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in descriptions.items()}


def type_name(annotation: Any) -> str:
    """The type of a parameter, as a reader would write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(type_name(one) for one in arguments)
    if annotation is NoneType:
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
