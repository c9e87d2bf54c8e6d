"""The pydantic models of a spec."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from ..core.printable import HIDDEN
from ..errors import SpecError, TrioError, did_you_mean
from ..registry import registry_of
from .engines import EngineReadiness, engine_readiness
from .messages import Wrong, at, short, translate
from .reading import dump, load
from .rules import check_budget, check_groups, check_growth, check_order, format_share, parse_share

__all__ = [
    "Budget",
    "CompressorSpec",
    "Keep",
    "PartSpec",
    "PipelineSpec",
    "StageSpec",
]

KEEP_HELP = (
    'a count for each image such as 32, a share such as "5.6%", {share: "33.3%", of: start | current, per: image | '
    'sample}, {count: 64, per: image | sample}, or "auto" (solved from budget.average); a compressor\'s number may '
    "also be `per: tile` (a tile of a tiled image, a frame of a video)"
)
DEPTH_HELP = 'the number of decoder layers already run, 0 or more, or a share of the depth from "0%" to below "100%"'
PART_HELP = "a registered name, or a mapping with `name` and the part's own parameters"
COMPRESSOR_HELP = "the reduction on the encoder side: a name, or a mapping with `name`, `keep` and parameters"
RESIZE_HELP = (
    'what happens to an image in front of the processor: a share such as "60%" of its visual tokens, or a count such '
    "as 256; images are never enlarged"
)
IF_FEWER_HELP = "where an image has fewer tokens than the count: keep them all, or raise"
Group = Literal["image", "sample", "tile"]
IfFewer = Literal["keep-all", "error"]
MAX_NUMBER = 10**9  # no model has so many tokens or layers; larger numbers do not even fit a float
MAX_STAGES = 1000
_PERCENT = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$"}


class _Translate(type(BaseModel)):  # type: ignore[misc]  # pydantic has no public name for its metaclass
    """Makes objects whose problems are `SpecError`s; models inside others are validated by pydantic in one go."""

    def __call__(cls, *args: Any, **data: Any) -> Any:
        try:
            return super().__call__(*args, **data)
        except ValidationError as error:
            raise translate(error, cls) from error


_Translating: Any = _Translate  # without its type, which mypy takes for a conflict with that of BaseModel


class _Model(BaseModel, metaclass=_Translating):  # type: ignore[metaclass]  # mypy has not seen the metaclass above
    """Base of the spec's models: frozen, unknown keys refused, problems raised as `SpecError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, strict=True)

    #: Fields that are written even where they have their default.
    always: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Validate a value in any of the forms that a spec file allows.

        Raises:
            SpecError: it is in none of them.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise translate(error, cls) from error

    def written(self) -> list[str]:
        """Names of the fields that stand in a file: those that have another value than their default."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name in self.always or getattr(self, name) != field.get_default(call_default_factory=True)
        ]


def _keep_forms(schema: dict[str, Any]) -> None:
    """The forms of `Keep` in a file, from the schema of its fields."""
    fields = {name: _without_null(one) for name, one in schema["properties"].items()}
    auto = {"const": "auto", "description": fields.pop("auto")["description"]}
    long = [
        {
            "type": "object",
            "properties": {name: fields[name] for name in names},
            "required": [names[0]],
            "additionalProperties": False,
        }
        for names in (("count", "per"), ("share", "of", "per", "rounding"))
    ]
    schema.clear()
    schema.update({"description": KEEP_HELP, "anyOf": [fields["count"], fields["share"], auto, *long]})


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field for a file, where nothing is written for None."""
    first, *others = schema.get("anyOf", [{}])
    named = {key: value for key, value in schema.items() if key != "title"}
    if others != [{"type": "null"}]:
        return named
    return {**first, **{key: value for key, value in named.items() if key not in ("anyOf", "default")}}


class Keep(_Model):
    """How many visual tokens are kept: exactly one of `count`, `share` and `auto`.

    Attributes:
        count: tokens for each image (or sample), 0 or more; 0 drops them all.
        share: a percentage above 0% and up to 100%, as text, for example "5.6%".
        of: what the share is of: the tokens that the group started with, or those that reach the stage.
        per: the group that the number is for: each image, all images of a sample together, or (compressors only) each
            input of the vision tower: a tile of a tiled image, a frame of a video.
        rounding: of a share that is no whole number of tokens: to the nearest (half up), or down, as the released
            code for Qwen does. At least one token of any is kept.
        auto: solved from `budget.average`.
    """

    model_config = ConfigDict(json_schema_extra=_keep_forms)

    count: Annotated[int, Field(ge=0)] | None = Field(default=None, description="tokens kept for each image")
    share: Annotated[str, WithJsonSchema(_PERCENT)] | None = Field(
        default=None, description="share of the tokens that the image started with"
    )
    of: Literal["start", "current"] = Field(default="start", description="what the share is of")
    per: Group = Field(default="image", description="the group that the number is for")
    rounding: Literal["nearest", "down"] = Field(
        default="nearest", description="how a share becomes a number of tokens"
    )
    auto: bool = Field(default=False, description="solved from budget.average")

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
            raise Wrong(
                f"found {value!r}. A number is a count and has no fraction; write a share as a percentage, for example "
                f'"{value * 100:g}%".'
                if math.isfinite(value)
                else f"found {value!r}. Allowed: {KEEP_HELP}."
            )
        if not isinstance(value, Mapping):
            raise Wrong(f"found {short(value)}. Allowed: {KEEP_HELP}.")
        return cls._checked(dict(value))

    @classmethod
    def _checked(cls, value: dict[str, Any]) -> dict[str, Any]:
        keys = [name for name in cls.model_fields if name != "auto"]  # in a file, auto is a word
        for key in value:
            if key not in cls.model_fields:
                raise Wrong(f"unknown key {key!r}. {did_you_mean(str(key), keys)}Allowed: {', '.join(keys)}.", (key,))
        given = [key for key in ("count", "share", "auto") if value.get(key) is not None and value[key] is not False]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise Wrong(f"found {found}; give exactly one of count and share. Allowed: {KEEP_HELP}.")
        for key in ("of", "per", "rounding"):
            options = get_args(cls.model_fields[key].annotation)
            if key in value and value[key] not in options:
                raise Wrong(f"found {short(value[key])}; allowed: {' or '.join(options)}.", (key,))
        if "share" in given:
            try:
                share = parse_share(value["share"])
            except ValueError:
                raise Wrong(f"found {short(value['share'])}. Allowed: {KEEP_HELP}.") from None
            if not 0 < share <= 1:
                raise Wrong(
                    f"found {short(value['share'])}; a share is above 0% and at most 100%. To drop every visual token, "
                    "write the count 0."
                )
            value["share"] = format_share(share)
        elif value.get("of", "start") != "start":
            raise Wrong("only a share is `of: current`; remove `of`, or write a share.", ("of",))
        elif value.get("rounding", "nearest") != "nearest":
            raise Wrong("only a share is rounded; remove `rounding`, or write a share.", ("rounding",))
        if "count" in given:
            count = value["count"]
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_NUMBER:
                raise Wrong(f"found {short(count)}; a count is a whole number of tokens, 0 or more (at most 10^9).")
        if "auto" in given and value.get("per", "image") != "image":
            raise Wrong(
                f"auto is solved for each image; remove `per: {value['per']}`, or write a count or a share.", ("per",)
            )
        return value

    @property
    def fraction(self) -> Fraction | None:
        """The share as an exact fraction, or None."""
        return None if self.share is None else parse_share(self.share)

    @model_serializer
    def _short_form(self) -> int | str | dict[str, Any]:
        if self.auto:
            return "auto"
        long = {name: getattr(self, name) for name in self.written()}
        short_form: int | str = next(iter(long.values()))
        return long if len(long) > 1 else short_form


def _depth(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER:
        return value
    try:
        share = parse_share(value)
    except ValueError:
        raise Wrong(f"found {short(value)}. Allowed: {DEPTH_HELP}.") from None
    if share >= 1:
        raise Wrong(f"found {short(value)}: no layer is left after the last one. Allowed: {DEPTH_HELP}.")
    return format_share(share)


Depth = Annotated[
    int | str,
    PlainValidator(_depth),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, _PERCENT], "description": DEPTH_HELP}),
]


def _average(value: Any) -> int | float | str:
    allowed = 'Allowed: tokens for each image, 1 or more, or a share above "0%" and below "100%"'
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= MAX_NUMBER and math.isfinite(value):
        if value >= 1:
            return value
        raise Wrong(f'found {value!r}. {allowed}; did you mean "{value * 100:g}%"?')
    try:
        share = parse_share(value)
    except ValueError:
        raise Wrong(f"found {short(value)}. {allowed}.") from None
    if not 0 < share < 1:
        raise Wrong(f"found {short(value)}. {allowed}.")
    return format_share(share)


def _resize(value: Any) -> int | str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_NUMBER):
        return value
    try:
        share = parse_share(value)
    except ValueError:
        raise Wrong(f"found {short(value)}. Allowed: {RESIZE_HELP}.") from None
    if not 0 < share <= 1:
        raise Wrong(f"found {short(value)}; a share is above 0% and at most 100%. Allowed: {RESIZE_HELP}.")
    return format_share(share)


Resize = Annotated[
    int | str | None,
    PlainValidator(_resize),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, _PERCENT, {"type": "null"}]}),
]


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


def _part_forms(schema: dict[str, Any]) -> None:
    """The forms of a part in a file, from the schema of its fields: a name, or a flat mapping with parameters."""
    fields = {name: _without_null(one) for name, one in schema["properties"].items() if name not in ("params", "obj")}
    mapping = {"type": "object", "properties": fields, "required": schema["required"]}
    what = PART_HELP if len(fields) == 1 else COMPRESSOR_HELP
    schema.clear()
    schema.update({"description": what, "anyOf": [fields["name"], mapping]})


class PartSpec(_Model):
    """A part and its parameters; in a file, a name or a flat mapping.

    Attributes:
        name: the registered name (of an object: its class's name).
        params: the part's own parameters.
        obj: an object or a class given in place of a name; not written to files.
    """

    model_config = ConfigDict(json_schema_extra=_part_forms)
    always = frozenset({"name"})

    name: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    obj: Any = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        own = [name for name in cls.model_fields if name not in ("name", "params", "obj")]
        return value if isinstance(value, cls) else _flat(value, own)

    def as_mapping(self) -> dict[str, Any]:
        """The flat mapping that the registries build from."""
        return {"name": self.name, **self.params}

    @model_serializer
    def _short_form(self) -> str | dict[str, Any]:
        own = {name: getattr(self, name) for name in self.written() if name not in ("params", "obj")}
        return {**own, **self.params} if len(own) > 1 or self.params else self.name


def _flat(value: Any, own: Sequence[str]) -> Any:
    """A part in any of its forms as {name, params, obj, ...own}; `own` are keys that are not the part's parameters."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        if value is None or isinstance(value, bool | int | float | Sequence):
            raise Wrong(f"found {short(value)}. Allowed: {PART_HELP}.")
        return _from_object(value)
    data = dict(value)
    if any(not isinstance(key, str) for key in data):
        raise Wrong(f"found {short(value)}; keys are names. Allowed: {PART_HELP}.")
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
        raise Wrong(f"found {short(value)}; a name is text. Allowed: {PART_HELP}.", ("name",))
    return {"name": cls.__name__, "obj": value}


class CompressorSpec(PartSpec):
    """The reduction on the encoder side: the compressor, its parameters, and how many tokens it leaves.

    Attributes:
        name: the registered name.
        keep: tokens that it leaves; None where the method decides its own count.
        if_fewer: what happens where an image has fewer tokens than the count.
        split: how the number of an image or a sample is split over its tiles: `even`, in proportion to their tokens, or
            by `saliency`, the attention that each tile's place gets in the whole image that comes with the tiles.
        params: the compressor's own parameters.
        obj: an object or a class given in place of a name.
    """

    keep: Keep | None = Field(default=None, description=KEEP_HELP)
    if_fewer: IfFewer = Field(default="keep-all", description=IF_FEWER_HELP)
    split: Literal["even", "saliency"] = Field(default="even", description="a number over several tiles")


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

    always = frozenset({"scorer", "selector"})

    after_layer: Depth = Field(description=DEPTH_HELP)
    keep: Keep = Field(description=KEEP_HELP)
    if_fewer: IfFewer = Field(default="keep-all", description=IF_FEWER_HELP)
    scorer: PartSpec = Field(default=PartSpec(name="objective-gradient"), description=f"rates the tokens: {PART_HELP}")
    selector: PartSpec = Field(default=PartSpec(name="soft-nms"), description=f"chooses by the rating: {PART_HELP}")

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None:
            """Validate the fields; `keep`, `scorer` and `selector` take every form of a spec file, and objects.

            Raises:
                SpecError: a field is missing, unknown or wrong.
            """


def _name(value: str) -> str:
    if HIDDEN.search(value):
        raise Wrong(f"found {short(value)}; a name is printed, so it has no control characters. Write it without them.")
    return value


class PipelineSpec(_Model):
    """The declarative description of a pipeline.

    Attributes:
        version: of the format: 1.
        name: what reports call it.
        description: what it does, in a line or two.
        source: paper, address or file that it follows.
        resize: images are made smaller in front of the processor: a share of their visual tokens, or a count; None:
            they stay as they are. A pipeline only sees what the processor gives, so this is done by the processor of
            `Pipeline.processor`. All other numbers of a spec are of what is left.
        compressor: the reduction on the encoder side, or None.
        stages: the reductions inside the language model, in the order of the layers.
        positions: `original` leaves each survivor its own, `compact` renumbers them, `auto` does as the family's
            published code. On the zoo's tiny-llava original ones keep more (docs/results.md).
        budget: a promise about the average, checked; needed by `keep: auto`.
    """

    always = frozenset({"version", "name"})

    version: Literal[1] = Field(default=1, description="version of the format: 1")
    name: Annotated[str, AfterValidator(_name)] = Field(
        default="custom", min_length=1, description="what reports call it"
    )
    description: str = Field(default="", description="what it does, in a line or two")
    source: str = Field(default="", description="paper, address or file that it follows")
    resize: Resize = Field(default=None, description=RESIZE_HELP)
    compressor: CompressorSpec | None = Field(default=None, description="the reduction on the encoder side")
    stages: list[StageSpec] = Field(
        default_factory=list, max_length=MAX_STAGES, description="the reductions inside the language model"
    )
    positions: Literal["auto", "compact", "original"] = Field(
        default="original",
        description="original: each survivor keeps its own; compact: renumber them; auto: as the published code does",
    )
    newlines: Literal["with-row", "always", "never"] = Field(
        default="with-row",
        description="tokens that end the rows of a tiled image (LLaVA-NeXT, OneVision) and are no image: kept "
        "while their row has a token, always, or never",
    )
    budget: Budget | None = Field(default=None, description="a promise about the average, and what auto is solved from")

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        # An explicit null says "none", as in JSON that other programs write.
        if isinstance(value, Mapping) and isinstance(value.get("version"), bool):
            raise Wrong(f"found {value['version']!r}; allowed: 1.", ("version",))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compressor is None and not self.stages and self.resize is None:
            raise Wrong("the spec does nothing: give a compressor, at least one stage, resize, or several of them.")
        check_order(self.stages)
        check_groups(self.compressor, self.stages)
        check_growth(self.compressor, self.stages)
        check_budget(self.budget, self.compressor, self.stages)
        return self

    def resized(self, tokens: int) -> int:
        """The visual tokens that `resize` aims at for an image that has `tokens` (0 or more); `tokens` without one.

        What is reached is the nearest number that an image of these proportions can have: see
        `trio.encoders.resizing.resized_size`.
        """
        if self.resize is None:
            return tokens
        if isinstance(self.resize, int):
            return min(self.resize, tokens)
        return min(tokens, max(1, int(parse_share(self.resize) * tokens + Fraction(1, 2))))

    def reductions(self) -> Iterator[tuple[str, CompressorSpec | StageSpec]]:
        """The compressor, where there is one, and the stages, each with its path in the spec."""
        if self.compressor is not None:
            yield "compressor", self.compressor
        for index, stage in enumerate(self.stages):
            yield f"stages[{index}]", stage

    @property
    def engine_ready(self) -> EngineReadiness:
        """Whether it can be decided before the language model runs; where not, `.reason` says why.

        Serving engines need that: stages inside the model leave its layers with different numbers of keys.
        """
        return engine_readiness(self)

    def check_parts(self) -> None:
        """Make every part once, so that wrong names and parameters are found before a model is there.

        Raises:
            UnknownNameError: no registry has the name.
            PluginError: the part's distribution is broken.
            SpecError: a parameter is unknown, missing or wrong.
        """

        def made(spec_path: str, kind: str, part: PartSpec) -> None:
            try:
                registry_of(kind).build(part)
            except TrioError as error:
                raise at(error, spec_path) from error

        if self.compressor is not None:
            made("compressor", "compressor", self.compressor)
        for index, stage in enumerate(self.stages):
            made(f"stages[{index}].scorer", "scorer", stage.scorer)
            made(f"stages[{index}].selector", "selector", stage.selector)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data in its canonical short forms, defaults left out.

        Raises:
            SpecError: a part is an object that no registry knows by name.
        """
        full = self.model_dump()
        data = {name: full[name] for name in self.written()}
        if self.compressor is not None and self.compressor.obj is not None:
            named = _named(self.compressor.obj, "compressor", "compressor")
            own = full["compressor"] if isinstance(full["compressor"], dict) else {}
            data["compressor"] = {**own, **named}
        if self.stages:
            data["stages"] = [
                {name: out[name] for name in stage.written()}
                for stage, out in zip(self.stages, full["stages"], strict=True)
            ]
        for index, (stage, out) in enumerate(zip(self.stages, data.get("stages", []), strict=True)):
            for kind, part in (("scorer", stage.scorer), ("selector", stage.selector)):
                if part.obj is not None:
                    out[kind] = _named(part.obj, kind, f"stages[{index}].{kind}")
        return data

    def to_yaml(self) -> str:
        """The spec as YAML that `load_spec` reads back to an equal spec.

        Raises:
            SpecError: a part is an object that no registry knows by name, or a parameter is not plain data.
        """
        try:
            data = self.to_dict()
            text = dump(data)
            # Written plainly, some line-breaking characters (U+0085, U+2028) come back as others: escape those texts,
            # and those that would steer a terminal.
            if not HIDDEN.search(text.replace("\n", "")) and load(text) == data:
                return text
            return dump(data, ascii_only=True)
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
        from .schema import json_schema

        return json_schema(cls, parts=parts)


def _named(obj: Any, kind: str, spec_path: str) -> dict[str, Any]:
    """An object as the mapping that makes an equal one by name."""
    cls = obj if isinstance(obj, type) else type(obj)
    name = registry_of(kind).name_of(cls)
    if name is None:
        raise SpecError(
            f"{spec_path}: {cls.__qualname__} is not registered and cannot be written by name; decorate it with "
            f'@trio.{kind.upper()}S.register("...") first.',
            spec_path=spec_path,
        )
    params = {} if isinstance(obj, type) else obj.model_dump(exclude_defaults=True)
    return {"name": name, **params}
