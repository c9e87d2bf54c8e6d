"""What each parameter of a part means stands once, in the docstring of its class, and is read from there."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import trio
from trio.core.part import Part
from trio.encoders.compressors.base import COMPRESSORS
from trio.registry import Registry
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS

KINDS: dict[str, Registry[Any]] = {"scorers": SCORERS, "selectors": SELECTORS, "compressors": COMPRESSORS}
PARTS = [(kind, name) for kind, registry in KINDS.items() for name in registry.names()]


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    """What `trio list --json` says."""
    from trio.cli import app

    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """What `trio schema` prints."""
    from trio.cli import app

    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_parameter_of_every_part_is_described(kind: str, name: str, listed: dict[str, Any]) -> None:
    cls = KINDS[kind].get(name)
    shown = next(row["parameters"] for row in listed[kind] if row["name"] == name)
    schema = cls.model_json_schema().get("properties", {})
    for parameter in KINDS[kind].describe(name).parameters:
        assert len(parameter.description.split()) >= 2, f"{name}: {parameter.name} has no description"
        assert schema[parameter.name]["description"] == parameter.description
        assert shown[parameter.name]["description"] == parameter.description
        assert parameter.name + ": " in (cls.__doc__ or ""), "the reference shows the docstring"


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_the_schema_of_specs_offers_each_part_with_its_parameters(kind: str, name: str, schema: dict[str, Any]) -> None:
    """What an editor shows beside the name."""
    place = schema["properties"] if kind == "compressors" else schema["$defs"]["StageSpec"]["properties"]
    info = KINDS[kind].describe(name)
    offers = [one for one in place[kind.removesuffix("s")]["anyOf"] if one.get("required") == ["name"]]
    (offered,) = [one for one in offers if one["properties"]["name"] == {"enum": [name, *info.aliases]}]
    expected = {one.name: {"description": one.description} for one in info.parameters}
    assert {key: value for key, value in offered["properties"].items() if key != "name"} == expected
    assert offered["description"] == info.summary


def test_some_parts_have_parameters() -> None:
    assert sum(len(KINDS[kind].describe(name).parameters) for kind, name in PARTS) > 20


class Kite(Part):
    """A kite.

    Something about it: not a parameter.

    Parameters:
        tail: its length, in metres,
            on two lines: with a colon.
        colour (str): what it looks like
        unknown: no field of the class.
        said: not this, the field has its own

    Returns:
        nothing: not a parameter either.
    """

    tail: Annotated[int, Field(ge=1)] = 3
    colour: str = "red"
    said: int = Field(default=0, description="its own words")
    nothing: int = 0


class Box(Kite):
    """A kite like a box, without a word about parameters."""


class Other(Kite):
    """Another.

    Args:
        tail: of ribbons
        ribs: how many
    """

    ribs: int = 4


def described(cls: type[Part]) -> dict[str, str | None]:
    properties = cls.model_json_schema()["properties"]
    assert {name: info.description for name, info in cls.model_fields.items()} == {
        name: properties[name].get("description") for name in cls.model_fields
    }
    return {name: info.description for name, info in cls.model_fields.items()}


def test_descriptions_are_read_from_the_docstring() -> None:
    expected = {
        "tail": "its length, in metres, on two lines: with a colon.",
        "colour": "what it looks like",
        "said": "its own words",
        "nothing": None,
    }
    assert described(Kite) == described(Box) == expected
    assert described(Other) == {**expected, "tail": "of ribbons", "ribs": "how many"}
    assert described(Kite) == expected, "a subclass changes nothing of its base"
    assert Kite(tail=4).tail == 4
    with pytest.raises(trio.SpecError, match="tail: found 0"):
        Kite(tail=0)


def test_a_class_made_inside_a_function_works() -> None:
    Side = Literal["left", "right"]

    class Local(Part):
        """One with a type that only this function knows.

        Parameters:
            side: which one of the
                two: left or right
        """

        side: Side = "left"

    assert described(Local) == {"side": "which one of the two: left or right"}
    assert Local(side="right").side == "right"
    with pytest.raises(trio.SpecError, match="side"):
        Local(side="up")


def test_a_part_is_validated_inside_another_model() -> None:
    """Its own constructor is what runs there too, so that the error is the one that it gives alone."""

    class Leaf(Part):
        """A part.

        Parameters:
            size: at least one
        """

        size: Annotated[int, Field(ge=1)] = 1

    class Holder(BaseModel):
        leaf: Leaf = Leaf()

    assert Holder.model_validate({"leaf": {"size": 3}}).leaf == Leaf(size=3)
    assert Holder(leaf=Leaf(size=2)).model_copy(deep=True).leaf.size == 2
    assert Holder.model_validate_json('{"leaf": {"size": 4}}').leaf.size == 4
    with pytest.raises(trio.SpecError, match=r"Leaf: size: found 0.*Allowed parameters: size \(int\)"):
        Holder.model_validate({"leaf": {"size": 0}})
    assert "__pydantic_base_init__" not in vars(Part.__init__)
