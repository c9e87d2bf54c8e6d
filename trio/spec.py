"""The declarative description of a pipeline: pydantic models, YAML with line numbers, JSON schema.

A spec says *what* is done; `trio.schedule` says what that means for a model of a given depth, and the registries find
the parts. Nothing here imports torch until a spec's parts are checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from trio.errors import InputError, SpecError, TrioError, UnknownNameError, did_you_mean

__all__ = [
    "Budget",
    "CompressorSpec",
    "Keep",
    "PartSpec",
    "PipelineSpec",
    "StageSpec",
    "load_spec",
    "shipped_specs",
]

MAX_BYTES = 1 << 20  # a spec is a page of text; anything larger is some other file

KEEP_HELP = (
    'a count for each image such as 32, a share such as "5.6%", {share: "33.3%", of: start | current, per: image | '
    'sample}, {count: 64, per: image | sample}, or "auto" (solved from budget.average)'
)
DEPTH_HELP = 'the number of decoder layers already run, 0 or more, or a share of the depth from "0%" to below "100%"'
PART_HELP = "a registered name, or a mapping with `name` and the part's own parameters"
_PERCENT = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$"}


class _Wrong(ValueError):
    """A problem found by our own validators: a complete sentence, and optionally the place below the model."""

    def __init__(self, message: str, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


def parse_share(text: object) -> Fraction:
    """The exact value of a percentage such as "5.6%"; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text) if isinstance(text, str) and len(text) < 40 else None
    if match is None:
        raise ValueError(f"{text!r} is not a percentage")
    return Fraction(match[1]) / 100


def format_share(share: Fraction) -> str:
    """The shortest percentage with the exact value of `share` (which has to be a decimal fraction)."""
    value = Decimal(share.numerator * 100) / Decimal(share.denominator)
    return f"{value.normalize():f}%"


class _Model(BaseModel):
    """Base of the spec's models: frozen, unknown keys refused, problems raised as `SpecError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, strict=True)

    def __init__(self, **data: Any) -> None:
        """Validate the fields.

        Raises:
            SpecError: a field is missing, unknown or wrong, or fields contradict each other.
        """
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _translate(error, type(self)) from error

    # Says that this __init__ only calls pydantic's own, so that nested models are validated in one go.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # a function attribute that pydantic reads

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Validate a value in any of the forms that a spec file allows.

        Raises:
            SpecError: it is in none of them.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _translate(error, cls) from error


class Keep(_Model):
    """How many visual tokens are kept: exactly one of `count`, `share` and `auto`.

    Attributes:
        count: tokens for each image (or sample), 0 or more; 0 drops them all.
        share: a percentage above 0% and up to 100%, as text, for example "5.6%".
        of: what the share is of: the tokens that the group started with, or those that reach the stage.
        per: the group that the number is for: each image, or all images of a sample together.
        auto: solved from `budget.average`.
    """

    count: int | None = None
    share: str | None = None
    of: Literal["start", "current"] = "start"
    per: Literal["image", "sample"] = "image"
    auto: bool = False

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, Keep):
            return value
        if isinstance(value, str):
            value = {"auto": True} if value.strip() == "auto" else {"share": value}
        elif isinstance(value, int) and not isinstance(value, bool):
            value = {"count": value}
        elif isinstance(value, float):
            raise _Wrong(
                f"found {value!r}. A number is a count and has no fraction; write a share as a percentage, for example "
                f'"{value * 100:g}%".'
                if math.isfinite(value)
                else f"found {value!r}. Allowed: {KEEP_HELP}."
            )
        if not isinstance(value, Mapping):
            raise _Wrong(f"found {_short(value)}. Allowed: {KEEP_HELP}.")
        return cls._checked(dict(value))

    @classmethod
    def _checked(cls, value: dict[str, Any]) -> dict[str, Any]:
        keys = ("count", "share", "of", "per")
        for key in value:
            if key not in (*keys, "auto"):
                raise _Wrong(f"unknown key {key!r}. {did_you_mean(str(key), keys)}Allowed: {', '.join(keys)}.", (key,))
        given = [key for key in ("count", "share", "auto") if value.get(key) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise _Wrong(f"found {found}; give exactly one of count and share. Allowed: {KEEP_HELP}.")
        for key, options in (("of", ("start", "current")), ("per", ("image", "sample"))):
            if key in value and value[key] not in options:
                raise _Wrong(f"found {_short(value[key])}; allowed: {' or '.join(options)}.", (key,))
        if "share" in given:
            try:
                share = parse_share(value["share"])
            except ValueError:
                raise _Wrong(f"found {_short(value['share'])}. Allowed: {KEEP_HELP}.") from None
            if not 0 < share <= 1:
                raise _Wrong(
                    f"found {_short(value['share'])}; a share is above 0% and at most 100%. To drop every visual token, "
                    "write the count 0."
                )
            value["share"] = format_share(share)
        elif value.get("of", "start") != "start":
            raise _Wrong("only a share is `of: current`; remove `of`, or write a share.", ("of",))
        if "count" in given:
            count = value["count"]
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise _Wrong(f"found {_short(count)}; a count is a whole number of tokens, 0 or more.")
        if "auto" in given and value.get("per", "image") != "image":
            raise _Wrong("auto is solved for each image; remove `per: sample`, or write a count or a share.", ("per",))
        return value

    @property
    def fraction(self) -> Fraction | None:
        """The share as an exact fraction, or None."""
        return None if self.share is None else parse_share(self.share)

    @model_serializer
    def _short_form(self) -> int | str | dict[str, Any]:
        if self.auto:
            return "auto"
        long = {} if self.per == "image" else {"per": self.per}
        if self.count is not None:
            return {"count": self.count, **long} if long else self.count
        if self.of != "start":
            long = {"of": self.of, **long}
        return {"share": self.share, **long} if long else cast("str", self.share)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        per = {"enum": ["image", "sample"], "default": "image", "description": "the group that the number is for"}
        count = {"type": "integer", "minimum": 0}
        of = {"enum": ["start", "current"], "default": "start", "description": "what the share is of"}
        return {
            "description": KEEP_HELP,
            "anyOf": [
                {**count, "description": "tokens kept for each image"},
                {**_PERCENT, "description": "share of the tokens that the image started with"},
                {"const": "auto", "description": "solved from budget.average"},
                _object({"count": count, "per": per}, ["count"]),
                _object({"share": _PERCENT, "of": of, "per": per}, ["share"]),
            ],
        }


def _depth(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        share = parse_share(value)
    except ValueError:
        raise _Wrong(f"found {_short(value)}. Allowed: {DEPTH_HELP}.") from None
    if share >= 1:
        raise _Wrong(f"found {_short(value)}: no layer is left after the last one. Allowed: {DEPTH_HELP}.")
    return format_share(share)


Depth = Annotated[
    int | str,
    PlainValidator(_depth),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _PERCENT], "description": DEPTH_HELP}),
]


def _average(value: Any) -> int | float | str:
    allowed = 'Allowed: tokens for each image, 1 or more, or a share above "0%" and below "100%"'
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if value >= 1:
            return value
        raise _Wrong(f'found {value!r}. {allowed}; did you mean "{value * 100:g}%"?')
    try:
        share = parse_share(value)
    except ValueError:
        raise _Wrong(f"found {_short(value)}. {allowed}.") from None
    if not 0 < share < 1:
        raise _Wrong(f"found {_short(value)}. {allowed}.")
    return format_share(share)


class Budget(_Model):
    """A promise about the whole pipeline, checked, and what `keep: auto` is solved from.

    Attributes:
        average: visual tokens averaged over all decoder layers: a number for each image, or a share such as "11.1%" of
            the tokens that the image started with.
    """

    average: Annotated[
        int | float | str,
        PlainValidator(_average),
        WithJsonSchema({"anyOf": [{"type": "number", "minimum": 1}, _PERCENT]}),
    ] = Field(description='visual tokens averaged over the decoder layers: a number for each image, or a share "11.1%"')

    @property
    def fraction(self) -> Fraction | None:
        """The average as an exact fraction of the tokens at the start, or None where it is a number of tokens."""
        return parse_share(self.average) if isinstance(self.average, str) else None


class PartSpec(_Model):
    """A part and its parameters; in a file, a name or a flat mapping.

    Attributes:
        name: the registered name (of an object: its class's name).
        params: the part's own parameters.
        obj: an object or a class given in place of a name; not written to files.
    """

    name: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    obj: Any = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, PartSpec):
            return value
        return _flat(value, own=())

    def as_mapping(self) -> dict[str, Any]:
        """The flat mapping that the registries build from."""
        return {"name": self.name, **self.params}

    @model_serializer
    def _short_form(self) -> str | dict[str, Any]:
        return self.as_mapping() if self.params else self.name

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        return {
            "description": PART_HELP,
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "object", "properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]},
            ],
        }


def _flat(value: Any, own: Sequence[str]) -> Any:
    """A part in any of its forms as {name, params, obj, ...own}; `own` are keys that are not the part's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        if value is None or isinstance(value, bool | int | float | Sequence):
            raise _Wrong(f"found {_short(value)}. Allowed: {PART_HELP}.")
        return _from_object(value)
    data = dict(value)
    if any(not isinstance(key, str) for key in data):
        raise _Wrong(f"found {_short(value)}; keys are names. Allowed: {PART_HELP}.")
    if data.keys() <= {"name", "params", "obj", *own} and isinstance(data.get("params"), dict):
        flat = data
    else:
        kept = {key: data.pop(key) for key in ("name", *own) if key in data}
        flat = {**kept, "params": data}
    if not isinstance(flat.get("name", ""), str):
        flat = {**flat, **_from_object(flat["name"])}
    return flat


def _from_object(value: Any) -> dict[str, Any]:
    cls = value if isinstance(value, type) else type(value)
    if value is None or isinstance(value, bool | int | float | Sequence | Mapping):
        raise _Wrong(f"found {_short(value)}; a name is text. Allowed: {PART_HELP}.", ("name",))
    return {"name": cls.__name__, "obj": value}


class CompressorSpec(PartSpec):
    """The reduction on the encoder side: the compressor, its parameters, and how many tokens it leaves.

    Attributes:
        name: the registered name.
        keep: tokens that it leaves; None where the method decides its own count.
        if_fewer: what happens where an image has fewer tokens than the count.
        params: the compressor's own parameters.
        obj: an object or a class given in place of a name.
    """

    keep: Keep | None = Field(default=None, description=KEEP_HELP)
    if_fewer: Literal["keep-all", "error"] = "keep-all"

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        return value if isinstance(value, CompressorSpec) else _flat(value, own=("keep", "if_fewer"))

    @model_serializer
    def _short_form(self) -> str | dict[str, Any]:
        own: dict[str, Any] = {} if self.keep is None else {"keep": self.keep.model_dump()}
        if self.if_fewer != "keep-all":
            own["if_fewer"] = self.if_fewer
        return {"name": self.name, **own, **self.params} if own or self.params else self.name

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        properties = {
            "name": {"type": "string", "minLength": 1},
            "keep": Keep.__get_pydantic_json_schema__(None, None),
            "if_fewer": {"enum": ["keep-all", "error"], "default": "keep-all"},
        }
        return {
            "description": "the reduction on the encoder side: a name, or a mapping with `name`, `keep` and parameters",
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "object", "properties": properties, "required": ["name"]},
            ],
        }


class StageSpec(_Model):
    """One reduction inside the language model.

    Attributes:
        after_layer: decoder layers already run when the stage acts (0: at the input), or a share of the depth such as
            "50%", rounded down.
        keep: how many tokens are kept.
        if_fewer: where an image has fewer tokens than the count, keep them all (and report it), or raise.
        scorer: what rates the tokens: a name, a mapping, a `Scorer` class or object.
        selector: what chooses by the rating: a name, a mapping, a `Selector` class or object.
    """

    after_layer: Depth = Field(description=DEPTH_HELP)
    keep: Keep = Field(description=KEEP_HELP)
    if_fewer: Literal["keep-all", "error"] = Field(
        default="keep-all", description="where an image has fewer tokens than the count: keep them all, or raise"
    )
    scorer: PartSpec = Field(default=PartSpec(name="objective-gradient"), description=f"rates the tokens: {PART_HELP}")
    selector: PartSpec = Field(default=PartSpec(name="nms"), description=f"chooses by the rating: {PART_HELP}")

    def __init__(self, **fields: Any) -> None:
        """Validate the fields; `keep`, `scorer` and `selector` take every form that a spec file allows, and objects.

        Raises:
            SpecError: a field is missing, unknown or wrong.
        """
        super().__init__(**fields)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # as in _Model


class PipelineSpec(_Model):
    """The declarative description of a pipeline.

    Attributes:
        version: of the format: 1.
        name: what reports call it.
        description: what it does, in a line or two.
        source: paper, address or file that it follows.
        compressor: the reduction on the encoder side, or None.
        stages: the reductions inside the language model, in the order of the layers.
        positions: `compact` renumbers the survivors, `original` leaves each its own, `auto` does as the family's
            published code.
        budget: a promise about the average, checked; needed by `keep: auto`.
    """

    version: Literal[1] = Field(default=1, description="version of the format: 1")
    name: str = Field(default="custom", min_length=1, description="what reports call it")
    description: str = Field(default="", description="what it does, in a line or two")
    source: str = Field(default="", description="paper, address or file that it follows")
    compressor: CompressorSpec | None = Field(default=None, description="the reduction on the encoder side")
    stages: list[StageSpec] = Field(default_factory=list, description="the reductions inside the language model")
    positions: Literal["auto", "compact", "original"] = Field(
        default="auto",
        description="compact: renumber the survivors; original: each keeps its own; auto: as the published code does",
    )
    budget: Budget | None = Field(default=None, description="a promise about the average, and what auto is solved from")

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        # An explicit null says "none", as in JSON that other programs write.
        if isinstance(value, Mapping) and isinstance(value.get("version"), bool):
            raise _Wrong(f"found {value['version']!r}; allowed: 1.", ("version",))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compressor is None and not self.stages:
            raise _Wrong("the spec does nothing: give a compressor, at least one stage, or both.")
        _check_order(self.stages)
        _check_growth(self.compressor, self.stages)
        _check_budget(self.budget, self.compressor, self.stages)
        return self

    def reductions(self) -> Iterator[tuple[str, CompressorSpec | StageSpec]]:
        """The compressor, where there is one, and the stages, each with its place in the spec."""
        if self.compressor is not None:
            yield "compressor", self.compressor
        for index, stage in enumerate(self.stages):
            yield f"stages[{index}]", stage

    def check_parts(self) -> None:
        """Make every part once, so that wrong names and parameters are found before a model is there.

        Raises:
            UnknownNameError: no registry has the name.
            PluginError: the part's distribution is broken.
            SpecError: a parameter is unknown, missing or wrong.
        """
        from trio.registry import COMPRESSORS, SCORERS, SELECTORS

        def made(place: str, build: Callable[[], object]) -> None:
            try:
                build()
            except TrioError as error:
                raise _at(error, place) from error

        if self.compressor is not None:
            compressor = self.compressor
            made("compressor", lambda: COMPRESSORS.build(compressor))
        for index, stage in enumerate(self.stages):
            made(f"stages[{index}].scorer", lambda stage=stage: SCORERS.build(stage.scorer))  # type: ignore[misc]  # mypy cannot infer lambda defaults
            made(f"stages[{index}].selector", lambda stage=stage: SELECTORS.build(stage.selector))  # type: ignore[misc]  # as above

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data in its canonical short forms, defaults left out.

        Raises:
            SpecError: a part is an object that no registry knows by name.
        """
        from trio.registry import COMPRESSORS, SCORERS, SELECTORS

        full = self.model_dump()
        default = {
            "description": "",
            "source": "",
            "compressor": None,
            "stages": [],
            "positions": "auto",
            "budget": None,
        }
        data = {key: value for key, value in full.items() if key not in default or value != default[key]}
        if self.compressor is not None and self.compressor.obj is not None:
            named = _named(self.compressor.obj, COMPRESSORS, "compressor")
            own = (
                {}
                if isinstance(full["compressor"], str)
                else {k: v for k, v in full["compressor"].items() if k != "name"}
            )
            data["compressor"] = {**({"name": named} if isinstance(named, str) else named), **own}
        for index, (stage, out) in enumerate(zip(self.stages, data.get("stages", []), strict=True)):
            for key, part, registry in (("scorer", stage.scorer, SCORERS), ("selector", stage.selector, SELECTORS)):
                if part.obj is not None:
                    out[key] = _named(part.obj, registry, f"stages[{index}].{key}")
            if out["if_fewer"] == "keep-all":
                del out["if_fewer"]
        return data

    def to_yaml(self) -> str:
        """The spec as YAML that `load_spec` reads back to an equal spec.

        Raises:
            SpecError: a part is an object that no registry knows by name, or a parameter is not plain data.
        """
        try:
            return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)
        except yaml.YAMLError as error:
            raise SpecError(
                f"spec {self.name!r}: a parameter is not plain data ({error}); write it as text."
            ) from error

    @classmethod
    def json_schema(cls, *, parts: bool = False) -> dict[str, Any]:
        """The JSON schema (draft 2020-12) of spec files, for editors and other programs.

        Args:
            parts: also offer the names of all registered parts, which imports them (seconds, not milliseconds).
        """
        schema = cls.model_json_schema()
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = "trio pipeline spec"
        schema["required"] = ["version"]
        schema["anyOf"] = [{"required": ["compressor"]}, {"required": ["stages"]}]
        if parts:
            from trio.registry import COMPRESSORS, SCORERS, SELECTORS

            stage = schema["$defs"]["StageSpec"]["properties"]
            stage["scorer"] = _part_schema(SCORERS.names(), stage["scorer"], schema)
            stage["selector"] = _part_schema(SELECTORS.names(), stage["selector"], schema)
            properties = schema["properties"]
            properties["compressor"] = _part_schema(COMPRESSORS.names(), properties["compressor"], schema)
        return schema


def _part_schema(names: list[str], old: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a part with its known names offered first; other names (of plugins elsewhere) stay allowed."""
    if not names:
        return old
    return {
        "description": old.get("description", PART_HELP),
        "default": old.get("default"),
        "anyOf": [
            {"enum": names},
            {"type": "object", "properties": {"name": {"anyOf": [{"enum": names}, {"type": "string"}]}}},
            *[{key: value for key, value in old.items() if key not in ("description", "default")}],
        ],
    }


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _named(obj: Any, registry: Any, place: str) -> str | dict[str, Any]:
    cls = obj if isinstance(obj, type) else type(obj)
    name = registry.name_of(cls)
    if name is None:
        raise SpecError(
            f"{place}: {cls.__qualname__} is not registered and cannot be written by name; decorate it with "
            f'@trio.{registry.kind.upper()}S.register("...") first.',
            place=place,
        )
    params = {} if isinstance(obj, type) else obj.model_dump(exclude_defaults=True)
    return {"name": name, **params} if params else cast("str", name)


# What a spec must not say --------------------------------------------------------------------------------------------


def _check_order(stages: list[StageSpec]) -> None:
    for index in range(1, len(stages)):
        here = stages[index].after_layer
        for earlier in range(index):
            there = stages[earlier].after_layer
            if isinstance(here, int) != isinstance(there, int):
                continue  # a share against a number: decided when the depth is known
            now, before = (int(x) if isinstance(x, int) else parse_share(x) for x in (here, there))
            if now == before:
                raise _Wrong(
                    f"found {here!r}, which stages[{earlier}] has too; two stages cannot act at one layer. Move one of "
                    "them, or merge them.",
                    ("stages", index, "after_layer"),
                )
            if now < before:
                raise _Wrong(
                    f"found {here!r} after stages[{earlier}] at {there!r}; list the stages in the order of the layers.",
                    ("stages", index, "after_layer"),
                )


def _check_growth(compressor: CompressorSpec | None, stages: list[StageSpec]) -> None:
    seen: dict[tuple[str, str], tuple[str, int | Fraction]] = {}
    listed: list[tuple[tuple[str | int, ...], Keep | None]] = [
        (("compressor",), compressor.keep if compressor else None)
    ]
    listed += [(("stages", index), stage.keep) for index, stage in enumerate(stages)]
    for place, keep in listed:
        if keep is None or keep.auto or keep.of == "current":
            continue
        value = keep.count if keep.count is not None else cast("Fraction", keep.fraction)
        key = ("count" if keep.count is not None else "share", keep.per)
        before = seen.get(key)
        if before is not None and value > before[1]:
            raise _Wrong(
                f"found {keep.model_dump()!r}, more than the {before[0]} leaves; counts cannot grow. Keep fewer here or "
                "more there.",
                (*place, "keep"),
            )
        seen[key] = (path(place), value)


def _check_budget(budget: Budget | None, compressor: CompressorSpec | None, stages: list[StageSpec]) -> None:
    keeps: list[tuple[tuple[str | int, ...], Keep | None]] = [
        (("stages", index, "keep"), stage.keep) for index, stage in enumerate(stages)
    ]
    if compressor is not None:
        keeps.insert(0, (("compressor", "keep"), compressor.keep))
    for place, keep in keeps:
        if keep is None or not keep.auto:
            continue
        if budget is None:
            raise _Wrong(
                "found auto without a budget; add for example `budget: {average: 64}`, or write a count or a share.",
                place,
            )
        if compressor is not None and compressor.keep is None:
            raise _Wrong(
                "found auto, but the compressor decides its own count, so nothing can be solved; give compressor.keep.",
                place,
            )
        if any(other is not None and other.per == "sample" for _, other in keeps):
            raise _Wrong(
                "found auto beside `per: sample`; auto is solved for each image. Write a count or a share.", place
            )
    if budget is None:
        return
    if not stages and compressor is not None and compressor.keep is None:
        raise _Wrong("the only reduction decides its own count, so the budget means nothing; remove it.", ("budget",))
    average = budget.average
    for place, keep in keeps:
        if keep is None or keep.auto or keep.per == "sample" or keep.of == "current":
            continue
        value = keep.fraction if budget.fraction is not None else keep.count
        limit = budget.fraction if budget.fraction is not None else average
        tolerance = Fraction(1, 1000) if budget.fraction is not None else 0.5
        last, first = place == keeps[-1][0], place[0] == "compressor"
        if value is None:
            continue
        low, high = value > limit + tolerance, value < limit - tolerance  # type: ignore[operator]  # both share or both count
        if (last and low) or (first and high):
            raise _Wrong(
                f"an average of {average!r} contradicts {path(place)}: {keep.model_dump()!r}, which leaves "
                f"{'more' if low else 'fewer'} in every layer; change one of them.",
                ("budget", "average"),
            )


# Files and messages --------------------------------------------------------------------------------------------------


def path(place: Sequence[str | int]) -> str:
    """A place as text: ("stages", 1, "keep") -> "stages[1].keep"."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(problem: Any, root: type[BaseModel]) -> tuple[tuple[str | int, ...], str]:
    """Where a pydantic problem is, and what it says."""
    place: tuple[str | int, ...] = tuple(problem["loc"])
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, _Wrong):
        return place + error.place, str(error)
    model, field = _field(root, place)
    if problem["type"] == "extra_forbidden":
        known = list(model.model_fields) if model is not None else []
        key = str(place[-1])
        return place, f"unknown key {key!r}. {did_you_mean(key, known)}Allowed: {', '.join(known)}."
    help_ = f" Allowed: {field}." if field else ""
    if problem["type"] == "missing":
        return place, f"missing; add it.{help_}"
    return place, f"found {_short(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}.{help_}"


def _field(root: type[BaseModel], place: Sequence[str | int]) -> tuple[type[BaseModel] | None, str]:
    """The model that holds the last step of a place, and that field's description."""
    children: dict[str, type[BaseModel]] = {
        "compressor": CompressorSpec,
        "stages": StageSpec,
        "budget": Budget,
        "keep": Keep,
        "scorer": PartSpec,
        "selector": PartSpec,
    }
    model: type[BaseModel] = root
    names = [step for step in place if isinstance(step, str)]
    for name in names[:-1]:
        model = children.get(name, model)
    info = model.model_fields.get(names[-1]) if names else None
    return model, (info.description or "") if info is not None else ""


def _translate(
    error: ValidationError,
    root: type[BaseModel],
    origin: str = "",
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> SpecError:
    sentences: list[str] = []
    first: tuple[str, int | None] | None = None
    for problem in error.errors():
        place, text = _place(problem, root)
        line = _line(place, lines)
        where = ", ".join(part for part in (origin, f"line {line}" if line else "", path(place)) if part)
        sentences.append(f"{where}: {text}" if where else text)
        first = first or (path(place), line)
    place_text, line = first or ("", None)
    return SpecError(" ".join(sentences), place=place_text, line=line)


def _line(place: Sequence[str | int], lines: Mapping[tuple[str | int, ...], int] | None) -> int | None:
    if lines is None:
        return None
    for size in range(len(place), 0, -1):
        found = lines.get(tuple(place[:size]))
        if found is not None:
            return found
    return lines.get(())


def _at(error: TrioError, place: str, line: int | None = None, origin: str = "") -> TrioError:
    """The same error with its place (and line and file) in front."""
    where = ", ".join(part for part in (origin, f"line {line}" if line else "", place) if part)
    message = f"{where}: {error}" if where else str(error)
    return SpecError(message, place=place, line=line) if isinstance(error, SpecError) else type(error)(message)


def shipped_specs() -> list[str]:
    """The names of the specs that come with the package, sorted."""
    return sorted(file.stem for file in (Path(__file__).parent / "specs").glob("*.yaml"))


def load_spec(source: str | Path | Mapping[str, Any] | PipelineSpec, *, check_parts: bool = True) -> PipelineSpec:
    """Read and validate a spec.

    Args:
        source: the name of a shipped spec, the path of a YAML or JSON file, a mapping or a `PipelineSpec`.
        check_parts: also find every part and validate its own parameters.

    Raises:
        UnknownNameError: no shipped spec and no part has the name.
        SpecError: the file cannot be read or the spec is wrong; the message names the place and the line.
        InputError: `source` is nothing that a spec can be read from.
    """
    origin = ""
    lines: dict[tuple[str | int, ...], int] | None = None
    if isinstance(source, PipelineSpec):
        spec = source
    else:
        if isinstance(source, Mapping):
            data: Any = dict(source)
        elif isinstance(source, str | Path):
            file, origin = _find(source)
            data, lines = _read(file, origin)
        else:
            raise InputError(
                f"spec: found {_short(source)}; allowed are a shipped name, a path, a mapping or a PipelineSpec."
            )
        try:
            spec = PipelineSpec.model_validate(data)
        except ValidationError as error:
            raise _translate(error, PipelineSpec, origin, lines) from error
    if check_parts:
        try:
            spec.check_parts()
        except TrioError as error:
            place = str(error).partition(":")[0]
            steps = _steps(place)
            inner = error.__cause__ if isinstance(error.__cause__, TrioError) else error
            raise _at(inner, place, _line(steps, lines), origin) from error
    return spec


def _steps(place: str) -> tuple[str | int, ...]:
    return tuple(int(step) if step.isdigit() else step for step in re.findall(r"\w+", place))


def _find(source: str | Path) -> tuple[Path, str]:
    if isinstance(source, str) and source in shipped_specs():
        return Path(__file__).parent / "specs" / f"{source}.yaml", f"shipped spec {source}"
    file = Path(source)
    looks_like_path = isinstance(source, Path) or file.suffix in (".yaml", ".yml", ".json") or len(file.parts) > 1
    if looks_like_path or file.is_file():
        return file, str(file)
    raise UnknownNameError(
        f"there is no shipped spec {source!r}. {did_you_mean(str(source), shipped_specs())}Shipped: "
        f"{', '.join(shipped_specs())}; or give the path of a YAML file."
    )


def _read(file: Path, origin: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
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
        found = "an empty file" if data is None else f"{type(data).__name__} {_short(data)}"
        raise SpecError(
            f"{origin}: found {found}; a spec is a mapping of keys such as version, name and stages. `trio show trio-11 "
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
