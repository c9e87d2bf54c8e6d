"""Specs: every form, the round trip, YAML with line numbers, contradictions, the JSON schema."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import trio
from trio.errors import InputError, SpecError, UnknownNameError
from trio.spec import PartSpec, PipelineSpec, load_spec, shipped_specs
from trio.spec.messages import path, steps
from trio.spec.rules import format_share, parse_share

FULL: dict[str, Any] = {
    "version": 1,
    "name": "full",
    "description": "every field",
    "source": "here",
    "resize": "60%",
    "compressor": {"name": "scan", "keep": 96, "if_fewer": "error", "split": "saliency", "window": 6},
    "stages": [
        {
            "after_layer": 16,
            "keep": 32,
            "if_fewer": "error",
            "scorer": {"name": "objective-gradient", "positions": 4},
            "selector": {"name": "nms", "threshold": 0.8},
        }
    ],
    "positions": "compact",
    "newlines": "always",
    "budget": {"average": 64},
}


class Mine(trio.Scorer):
    """A scorer that no registry knows."""

    weight: float = 1.0

    def score(self, ctx: trio.LayerContext) -> torch.Tensor:
        return ctx.visual.float() * self.weight


def one(**stage: Any) -> PipelineSpec:
    return PipelineSpec.parse({"version": 1, "stages": [{"after_layer": 2, "keep": 8, **stage}]})


# Forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (32, 32),
        (0, 0),
        ("5.6%", "5.6%"),
        (" 050.0 % ", "50%"),
        ("100%", "100%"),
        ({"count": 32}, 32),
        ({"count": 32, "per": "image"}, 32),
        ({"count": 64, "per": "sample"}, {"count": 64, "per": "sample"}),
        ({"share": "33.3%"}, "33.3%"),
        ({"share": "33.3%", "of": "start"}, "33.3%"),
        ({"share": "33.3%", "of": "current"}, {"share": "33.3%", "of": "current"}),
        ({"share": "33.3%", "of": "current", "per": "sample"}, {"share": "33.3%", "of": "current", "per": "sample"}),
    ],
)
def test_forms_of_keep(written: Any, canonical: Any) -> None:
    keep = trio.Keep.parse(written)
    assert keep.model_dump() == canonical
    assert trio.Keep.parse(canonical) == keep
    assert one(keep=written).stages[0].keep == keep


def test_auto_needs_a_budget() -> None:
    with pytest.raises(SpecError, match=r"stages\[0\]\.keep: found auto without a budget; add"):
        one(keep="auto")
    spec = PipelineSpec(stages=[trio.Stage(after_layer=2, keep="auto")], budget=trio.Budget(average="11.1%"))
    assert spec.stages[0].keep.auto
    assert spec.budget is not None
    assert spec.budget.fraction == Fraction(111, 1000)


@given(st.decimals(min_value="0.001", max_value=100, places=3))
def test_shares_are_exact(percent: Any) -> None:
    share = parse_share(f"{percent}%")
    assert share == Fraction(percent) / 100
    assert parse_share(format_share(share)) == share


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (-1, "0 or more"),
        (True, "Allowed: a count"),
        (0.5, 'write a share as a percentage, for example "50%"'),
        (float("nan"), "Allowed: a count"),
        (float("inf"), "Allowed: a count"),
        ("5", "Allowed: a count"),
        ("five", "Allowed: a count"),
        ("-5%", "Allowed: a count"),
        ("0%", "above 0%"),
        ("100.1%", "at most 100%"),
        ("1e1%", "Allowed: a count"),
        ("9" * 60 + "%", "Allowed: a count"),
        (None, "Allowed: a count"),
        ([], "Allowed: a count"),
        ({}, "exactly one of count and share"),
        ({"count": 3, "share": "3%"}, "count and share; give exactly one"),
        ({"count": "3"}, "whole number"),
        ({"count": 3, "of": "current"}, "only a share"),
        ({"share": 0.3}, "Allowed: a count"),
        ({"share": "3%", "of": "now"}, r"\.of: found 'now'; allowed: start or current"),
        ({"share": "3%", "per": "batch"}, r"\.per: found 'batch'; allowed: image or sample"),
        ({"cuont": 3}, r"\.cuont: unknown key 'cuont'. Did you mean 'count'\?"),
    ],
)
def test_wrong_keeps(bad: Any, says: str) -> None:
    with pytest.raises(SpecError, match=rf"stages\[0\]\.keep.*{says}"):
        one(keep=bad)
    with pytest.raises(SpecError, match=says):
        trio.Stage(after_layer=1, keep=bad)
    with pytest.raises(SpecError):
        trio.Keep.parse(bad)


@pytest.mark.parametrize(("written", "canonical"), [(0, 0), (31, 31), ("50%", "50%"), ("3.20 %", "3.2%"), ("0%", "0%")])
def test_depths(written: Any, canonical: Any) -> None:
    assert one(after_layer=written).stages[0].after_layer == canonical


@pytest.mark.parametrize("bad", [-1, 1.5, True, "half", "100%", "120%", None, [1]])
def test_wrong_depths(bad: Any) -> None:
    with pytest.raises(SpecError, match=r"stages\[0\]\.after_layer: found .*Allowed: the number of decoder layers"):
        one(after_layer=bad)


@pytest.mark.parametrize("bad", [0, 0.5, -3, True, "0%", "100%", "x", None, float("nan"), float("inf"), []])
def test_wrong_budgets(bad: Any) -> None:
    with pytest.raises(SpecError, match=r"budget.average: found .*Allowed: tokens for each image"):
        PipelineSpec.parse({"stages": [{"after_layer": 1, "keep": 3}], "budget": {"average": bad}})


def test_parts_as_names_mappings_objects_and_classes() -> None:
    for scorer in ("random", {"name": "random"}, {"name": "random", "seed": 3}):
        spec = one(scorer=scorer)
        assert spec.stages[0].scorer.as_mapping()["name"] == "random"
        spec.check_parts()
    mine = Mine(weight=2.0)
    for given_, built in ((mine, mine), (Mine, Mine()), ({"name": Mine, "weight": 3.0}, Mine(weight=3.0))):
        stage = trio.Stage(after_layer="50%", keep="11.1%", scorer=given_, selector="soft-nms")
        assert trio.SCORERS.build(stage.scorer) == built
        assert stage.scorer.name == "Mine"
        PipelineSpec(stages=[stage]).check_parts()


def test_defaults() -> None:
    spec = one()
    assert (spec.version, spec.name, spec.positions) == (1, "custom", "original")
    assert (spec.budget, spec.compressor) == (None, None)
    (stage,) = spec.stages
    assert (stage.scorer.name, stage.selector.name, stage.if_fewer) == ("objective-gradient", "soft-nms", "keep-all")
    spec.check_parts()


def test_specs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        one().name = "other"  # type: ignore[misc]  # the point of the test


# Round trip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_specs())
def test_shipped_specs(name: str, tmp_path: Path) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert spec.description
    assert spec.source
    assert load_spec(spec) == spec
    assert load_spec(spec.to_dict()) == spec
    file = tmp_path / "copy.yaml"
    file.write_text(spec.to_yaml())
    assert load_spec(file) == load_spec(str(file)) == spec
    as_json = tmp_path / "copy.json"
    as_json.write_text(json.dumps(spec.to_dict(), indent="\t"))
    assert load_spec(as_json) == spec


def test_at_least_the_promised_specs_ship() -> None:
    assert {"trio-11", "trio-llava-1.5-64", "trio-llava-1.5-128", "trio-llava-1.5-192"} <= set(shipped_specs())


KEEPS = st.one_of(
    st.integers(0, 5000),
    st.integers(1, 1000).map(lambda x: f"{x / 10}%"),
    st.builds(
        lambda x, of, per: {"share": f"{x / 10}%", "of": of, "per": per},
        st.integers(1, 1000),
        st.sampled_from(["start", "current"]),
        st.sampled_from(["image", "sample"]),
    ),
    st.builds(lambda x, per: {"count": x, "per": per}, st.integers(0, 500), st.sampled_from(["image", "sample"])),
)
PARTS = st.one_of(
    st.just("nms"),
    st.dictionaries(
        st.sampled_from(["threshold", "on", "yes", "é", "x y"]),
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    ).map(lambda params: {"name": "nms", **params}),
)
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30)


@given(
    depths=st.lists(st.integers(0, 100), unique=True, max_size=4).map(sorted),
    keep=KEEPS,
    part=PARTS,
    compressor=st.none()
    | st.builds(
        lambda part, keep: {"keep": keep, **({"name": part} if isinstance(part, str) else part)}, PARTS, st.just("100%")
    ),
    text=TEXT,
    positions=st.sampled_from(["auto", "compact", "original"]),
)
def test_round_trip(depths: list[int], keep: Any, part: Any, compressor: Any, text: str, positions: str) -> None:
    if not depths and compressor is None:
        depths = [0]
    stages = [{"after_layer": depth, "keep": keep, "selector": part, "if_fewer": "error"} for depth in depths]
    data = {"version": 1, "description": text, "stages": stages, "compressor": compressor, "positions": positions}
    spec = PipelineSpec.parse(data)
    assert PipelineSpec.parse(yaml.safe_load(spec.to_yaml())) == spec
    assert PipelineSpec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert PipelineSpec.parse(spec.model_dump()) == spec


def test_objects_in_files() -> None:
    spec = PipelineSpec(stages=[trio.Stage(after_layer=1, keep=3, scorer=Mine())])
    with pytest.raises(SpecError, match=r"stages\[0\].scorer: Mine is not registered.*@trio.SCORERS.register"):
        spec.to_yaml()
    known = trio.SELECTORS.build("nms", threshold=0.5)
    spec = PipelineSpec(stages=[trio.Stage(after_layer=1, keep=3, selector=known)])
    assert spec.to_dict()["stages"][0]["selector"] == {"name": "nms", "threshold": 0.5}
    assert load_spec(spec.to_dict()).stages[0].selector.params == {"threshold": 0.5}
    odd = PipelineSpec(stages=[trio.Stage(after_layer=1, keep=3, scorer={"name": "random", "seed": object()})])
    with pytest.raises(SpecError, match="not plain data"):
        odd.to_yaml()


# Contradictions ------------------------------------------------------------------------------------------------------


def spec_of(*stages: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "stages": [{"after_layer": a, "keep": k} for a, k in stages], **more}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"version": 1}, "the spec does nothing: give a compressor, at least one stage"),
        ({"version": 1, "stages": [], "compressor": None}, "the spec does nothing"),
        (spec_of((4, 8), (4, 4)), r"stages\[1\].after_layer: found 4, which stages\[0\] has too"),
        (spec_of(("5%", 8), (7, 6), ("5.0%", 4)), r"stages\[2\].after_layer: found '5%', which stages\[0\] has too"),
        (
            spec_of((8, 8), (4, 4)),
            r"stages\[1\].after_layer: found 4 after stages\[0\] at 8; list the stages in the order",
        ),
        (spec_of(("50%", 8), (4, 6), ("10%", 4)), r"stages\[2\].after_layer: found '10%' after stages\[0\]"),
        (spec_of((4, 8), (8, 9)), r"stages\[1\].keep: found 9, more than stages\[0\] leaves; counts cannot grow"),
        (spec_of((4, "10%"), (8, "11%")), r"stages\[1\].keep: found '11%', more than"),
        (
            spec_of((4, 97), compressor={"name": "scan", "keep": 96}),
            r"stages\[0\].keep: found 97, more than the compressor",
        ),
        (spec_of((1, 8), (2, "5%"), (3, 9)), r"stages\[2\].keep: found 9, more than stages\[0\]"),
        (
            spec_of((4, 65), budget={"average": 64}),
            r"budget.average: an average of 64 contradicts stages\[0\].keep: 65",
        ),
        (spec_of((4, "12%"), budget={"average": "11%"}), r"contradicts stages\[0\].keep: '12%', which leaves more"),
        (
            spec_of((4, 30), compressor={"name": "scan", "keep": 60}, budget={"average": 64}),
            "contradicts compressor.keep: 60, which leaves fewer",
        ),
        (spec_of((4, "auto"), compressor="scan", budget={"average": 64}), "compressor decides its own count"),
        (
            spec_of((4, {"count": 9, "per": "sample"}), (8, "auto"), budget={"average": 64}),
            "auto beside `per: sample`",
        ),
        ({"version": 1, "compressor": "prumerge", "budget": {"average": 64}}, "the budget means nothing"),
        (spec_of((4, 8), stagse=[]), r"stagse: unknown key 'stagse'. Did you mean 'stages'\?"),
        (spec_of((4, 8), version=2), "version: found 2"),
        (spec_of((4, 8), version=True), "version: found True; allowed: 1"),
        (spec_of((4, 8), name=""), "name: found ''"),
        (spec_of((4, 8), name=3), "name: found 3"),
        (spec_of((4, 8), positions="copmact"), "positions: found 'copmact'"),
        (spec_of((4, 8), budget=64), "budget: found 64"),
        (spec_of((4, 8), budget={}), "budget.average: missing; add it"),
        (spec_of((4, 8), budget={"avrage": 3, "average": 3}), "Did you mean 'average'"),
        ({"version": 1, "stages": "x"}, "stages: found 'x'"),
        ({"version": 1, "stages": ["x"]}, r"stages\[0\]: found 'x'"),
        ({"version": 1, "stages": [{"keep": 3}]}, r"stages\[0\].after_layer: missing; add it. Allowed: the number"),
        ({"version": 1, "stages": [{"after_layer": 3}]}, r"stages\[0\].keep: missing; add it. Allowed: a count"),
        ({"version": 1, "compressor": {"keep": 3}}, "compressor.name: missing; add it"),
        ({"version": 1, "compressor": 3}, "compressor: found 3"),
        ({"version": 1, "compressor": {"name": 3}}, "compressor.name: found 3; a name is text"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        load_spec(data, check_parts=False)
    assert "pydantic" not in str(caught.value)


def test_every_problem_is_reported() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_of((-1, 8), (4, "x"), positions=3))
    assert [place in str(caught.value) for place in ("stages[0].after_layer", "stages[1].keep", "positions")] == [
        True
    ] * 3


# Every field x every class of failure, from the schema ---------------------------------------------------------------

OUT_OF_RANGE = {
    "version": 2,
    "name": "",
    "positions": "middle",
    "newlines": "sometimes",
    "if_fewer": "maybe",
    "after_layer": -1,
    "keep": -1,
    "average": 0,
    "resize": 0,
}


def fields(data: Any, place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The place of every key in a spec."""
    if isinstance(data, dict):
        return [one_ for key, value in data.items() for one_ in [(*place, key), *fields(value, (*place, key))]]
    if isinstance(data, list):
        return [one_ for index, value in enumerate(data) for one_ in fields(value, (*place, index))]
    return []


def at(data: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        data = data[step]
    return data


REQUIRED = {("compressor", "name"), ("stages", 0, "after_layer"), ("stages", 0, "keep"), ("budget", "average")}
PARAMETERS = {("compressor", "window"), ("stages", 0, "scorer", "positions"), ("stages", 0, "selector", "threshold")}
SPEC_FIELDS = [place for place in fields(FULL) if place not in PARAMETERS]


def test_the_table_covers_the_schema() -> None:
    schema = PipelineSpec.json_schema()
    defs = schema["$defs"]
    assert set(FULL) == set(schema["properties"])
    assert set(FULL["stages"][0]) == set(defs["StageSpec"]["properties"])
    assert set(FULL["budget"]) == set(defs["Budget"]["properties"])
    assert set(FULL["compressor"]) - {"window"} == set(defs["CompressorSpec"]["anyOf"][1]["properties"])


@pytest.mark.parametrize("place", SPEC_FIELDS, ids=path)
@pytest.mark.parametrize("failure", ["missing", "unknown", "wrong type", "out of range"])
def test_every_field_and_failure(place: tuple[str | int, ...], failure: str) -> None:
    data = copy.deepcopy(FULL)
    holder, key = at(data, place[:-1]), place[-1]
    wanted = path(place)
    if failure == "missing":
        del holder[key]
        if place == ("stages",):
            del data["budget"]  # which the compressor alone contradicts
        if place == ("compressor", "keep"):
            del data["compressor"]["split"]  # which has nothing to split then
        if place not in REQUIRED and place[-2:] not in {("scorer", "name"), ("selector", "name")}:
            assert load_spec(data, check_parts=False).version == 1  # an optional field has a default
            return
    elif failure == "unknown":
        if place[-2:-1] in {("scorer",), ("selector",)} or place[0] == "compressor":
            holder[f"{key}x"] = 1  # a parameter: refused by the part below
            with pytest.raises((SpecError, UnknownNameError), match=f"{key}x|scan"):
                load_spec(data)
            return
        holder[f"{key}x"] = holder.pop(key)
        wanted = f"{wanted}x: unknown key '{key}x'. Did you mean '{key}'"
    elif failure == "wrong type":
        holder[key] = ["wrong"] if key != "stages" else "wrong"
    else:
        if key not in OUT_OF_RANGE:
            holder[key] = 1e999
        else:
            holder[key] = OUT_OF_RANGE[str(key)] if place[-2:-1] not in {("scorer",), ("selector",)} else ""
    with pytest.raises(SpecError) as caught:
        load_spec(data, check_parts=False)
    assert wanted in str(caught.value)
    assert caught.value.spec_path


@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        ({"scorer": "objectve-gradient"}, UnknownNameError, r"stages\[0\].scorer: .*Did you mean 'objective-gradient'"),
        ({"selector": "nsm"}, UnknownNameError, r"stages\[0\].selector: .*'nms'"),
        (
            {"scorer": {"name": "objective-gradient", "position": 4}},
            SpecError,
            r"stages\[0\].scorer: scorer 'objective-gradient': unknown parameter 'position'. Did you mean 'positions'",
        ),
        ({"scorer": {"name": "objective-gradient", "positions": "four"}}, SpecError, "positions: found 'four'"),
        ({"scorer": {"name": "objective-gradient", "positions": 0}}, SpecError, "positions: found 0"),
        ({"selector": {"name": "nms", "threshold": "high"}}, SpecError, "threshold: found 'high'"),
        ({"selector": "objective-gradient"}, UnknownNameError, "there is no selector"),
    ],
)
def test_parameters_of_parts(stage: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_spec({"version": 1, "stages": [{"after_layer": 1, "keep": 8, **stage}]})


def test_unknown_compressor() -> None:
    with pytest.raises(UnknownNameError, match="compressor: there is no compressor 'no-such'"):
        load_spec({"version": 1, "compressor": {"name": "no-such", "keep": 4}})


# Files ---------------------------------------------------------------------------------------------------------------

YAML = """\
version: 1
name: mine
stages:
  - after_layer: 1
    keep: 92
  - after_layer: 10
    keep: 54
    scorer:
      name: objective-gradient
      positions: 4
"""


def test_yaml_reads(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(YAML)
    assert [stage.keep.count for stage in load_spec(file).stages] == [92, 54]


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("    keep: 54", "    kepe: 54", 7, "stages[1].kepe: unknown key 'kepe'. Did you mean 'keep'?"),
        ("    keep: 54", "    keep: 5.4", 7, "stages[1].keep: found 5.4"),
        ("    keep: 54", "    keep: 93", 7, "stages[1].keep: found 93, more than stages[0] leaves"),
        ("    keep: 54", "    keep: {share: x}", 7, "stages[1].keep: found 'x'"),
        ("    keep: 54\n", "", 6, "stages[1].keep: missing"),
        ("    keep: 54", "    keep: 54\n    keep: 55", 8, "stages[1].keep: the key is there twice"),
        ("positions: 4", "position: 4", 8, "unknown parameter 'position'. Did you mean 'positions'?"),
        ("objective-gradient", "objectiv-gradient", 8, "there is no scorer 'objectiv-gradient'"),
        ("name: mine", "name: [mine", 3, "not valid YAML"),
        ("name: mine", "name: !!python/object/apply:os.system [ls]", 2, "Remove the tag"),
        ("name: mine", "name: !custom x", 2, "Remove the tag"),
        ("name: mine", "name: &a [*a]", 2, "an alias refers to itself"),
        ("name: mine", "name: " + "[" * 30 + "]" * 30, 2, "nested too deeply"),
        ("name: mine", "\tname: mine", 2, "not valid YAML"),
        ("name: mine", "name: *nothing", 2, "not valid YAML"),
        ("version: 1\n", "", 1, "version: missing; add `version: 1`"),
    ],
)
def test_yaml_errors_name_the_line(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    file = tmp_path / "mine.yaml"
    assert YAML.count(old) == 1
    file.write_text(YAML.replace(old, new))
    with pytest.raises((SpecError, UnknownNameError)) as caught:
        load_spec(file)
    assert str(caught.value).startswith(f"{file}, line {line}")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found an empty file; a spec is a mapping"),
        (b"# only a comment\n", "found an empty file"),
        (b"- a\n- b\n", "found a list"),
        (b"just text", "found text that is no mapping"),
        (b"12", "found text that is no mapping"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"x" * (1 << 20) + b"xx", "larger than 1048576 bytes"),
        (b"version: 1\n---\nversion: 1\n", "not valid YAML"),
        (b"version: 1\nat: 2020-13-45\n", "unknown key 'at'"),
    ],
)
def test_files_that_are_no_specs(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_spec(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)


def test_bad_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{\n"version": 1,\n}')
    with pytest.raises(SpecError, match=r"x\.json, line [23]: not valid JSON"):
        load_spec(file)
    file.write_text('{\n\t"version": 1,\n\t"version": 1}')
    with pytest.raises(SpecError, match="line 3, version: the key is there twice"):
        load_spec(file)


def test_unreadable_files(tmp_path: Path) -> None:
    for source in (tmp_path / "none.yaml", str(tmp_path / "none.yaml"), tmp_path):
        with pytest.raises(SpecError, match=r"cannot be read .*; check the path"):
            load_spec(source)


def test_unknown_names_and_sources() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no shipped spec 'trio-12'. Did you mean 'trio-11'.*Shipped: .*, trio-11,"
    ):
        load_spec("trio-12")
    for wrong in (3, None, ["trio-11"]):
        with pytest.raises(InputError, match="allowed are a shipped name, a path, a mapping"):
            load_spec(wrong)  # type: ignore[arg-type]  # the point of the test


def test_places_are_invertible() -> None:
    assert path(("stages", 1, "keep")) == "stages[1].keep"
    assert steps("stages[1].keep") == ("stages", 1, "keep")


# JSON schema ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [False, True])
def test_schema_accepts_what_loads(parts: bool) -> None:
    schema = PipelineSpec.json_schema(parts=parts)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in shipped_specs():
        file = Path(trio.__file__).parent / "spec" / "shipped" / f"{name}.yaml"
        validator.validate(yaml.safe_load(file.read_text()))
        validator.validate(load_spec(name).to_dict())
    validator.validate(FULL)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"stages": [{"after_layer": -1, "keep": 3}]},
        {"stages": [{"after_layer": 1}]},
        {"stages": [{"after_layer": 1, "keep": "3"}]},
        {"stages": [{"after_layer": 1, "keep": 3, "extra": 1}]},
        {"positions": "x"},
        {"budget": {}},
        {"unknown": 1},
    ],
)
def test_schema_refuses_what_does_not_load(change: dict[str, Any]) -> None:
    data = {**FULL, **change}
    for parts in (False, True):
        assert not jsonschema.Draft202012Validator(PipelineSpec.json_schema(parts=parts)).is_valid(data)
    with pytest.raises(SpecError):
        load_spec(data, check_parts=False)


def test_schema_offers_the_known_parts() -> None:
    text = json.dumps(PipelineSpec.json_schema(parts=True))
    assert '"last-token-attention"' in text
    assert '"top-k"' in text
    assert all("description" in field for field in PipelineSpec.json_schema()["properties"].values())


def test_part_spec_equality() -> None:
    assert PartSpec.parse("nms") == PartSpec(name="nms") == PartSpec.parse({"name": "nms"})
    assert PartSpec.parse({"name": "nms", "threshold": 0.5}) == PartSpec(name="nms", params={"threshold": 0.5})
