"""The registry: names, aliases, suggestions, plugins that work and plugins that are broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import trio
from trio.core.part import Part
from trio.errors import InputError, PluginError, SpecError, UnknownNameError
from trio.registry import Registry
from trio.spec import PartSpec


class Toy(Part):
    """Base of the toys."""


class Square(Toy):
    """A square toy.

    More about it.
    """

    side: int = Field(default=3, ge=1, description="edge length")
    colour: str


class Round(Toy):
    """A round toy."""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[Toy]]:
    """A registry of toys whose built-in package has one module with one toy."""
    package = tmp_path / "toybox"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_private.py").write_text("raise RuntimeError('private modules are not imported')")
    module = "from tests_toys import registry, Toy\n@registry.register('ball', aliases=('sphere',))\nclass Ball(Toy):\n"
    (package / "ball.py").write_text(module + "    '''A ball.'''\n    size: float = 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[Toy] = Registry("toy", Toy, builtin="toybox", group="toys")
    shared = type(sys)("tests_toys")
    shared.registry, shared.Toy = registry, Toy  # type: ignore[attr-defined]  # a module made on the spot
    monkeypatch.setitem(sys.modules, "tests_toys", shared)
    yield registry
    for name in [name for name in sys.modules if name.partition(".")[0] in ("toybox", "toyplugin", "toybroken")]:
        del sys.modules[name]


def plugin(folder: Path, dist: str, entries: dict[str, str], files: dict[str, str], group: str = "toys") -> None:
    """An installed distribution with entry points."""
    info = folder / f"{dist}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    for name, text in files.items():
        (folder / name).write_text(text)


GOOD = {"toyplugin.py": "from tests_toys import Toy\nclass Kite(Toy):\n    '''A kite.'''\n    tail: int = 2\n"}
BAD = {"toybroken.py": "import a_module_that_does_not_exist\n"}


def test_decorator_returns_the_class_unchanged(toys: Registry[Toy]) -> None:
    assert toys.register("square", aliases=("box",))(Square) is Square
    assert toys.get("square") is toys.get("box") is Square
    assert toys.name_of(Square) == "square"
    assert toys.name_of(Round) is None


def test_builtins_are_found_lazily(toys: Registry[Toy]) -> None:
    assert "toybox.ball" not in sys.modules
    assert toys.get("sphere").__name__ == "Ball"
    assert "toybox.ball" in sys.modules


def test_duplicates_are_refused(toys: Registry[Toy]) -> None:
    toys.register("square")(Square)
    toys.register("square")(Square)  # the same object is fine
    with pytest.raises(InputError, match=r"'square' is taken by .*Square; register .*Round under another name"):
        toys.register("square")(Round)
    with pytest.raises(InputError, match="'square' is taken"):
        toys.register("round", aliases=("square",))(Round)
    assert "round" not in toys.names()


def test_a_notebook_cell_may_run_twice(toys: Registry[Toy]) -> None:
    first, second = (type("Cell", (Toy,), {"__module__": "__main__"}) for _ in range(2))
    toys.register("cell")(first)
    toys.register("cell")(second)
    assert toys.get("cell") is second


@pytest.mark.parametrize("name", ["", "Square", "two words", "-x", "a_b", "a--b"])
def test_malformed_names_are_refused(toys: Registry[Toy], name: str) -> None:
    with pytest.raises(InputError, match="only lower-case letters"):
        toys.register(name)(Square)


@pytest.mark.parametrize("wrong", [int, 3, lambda: None])
def test_the_base_is_required(toys: Registry[Toy], wrong: Any) -> None:
    with pytest.raises(InputError, match=r"not a subclass of .*Toy"):
        toys.register("x")(wrong)


def test_unknown_names_suggest_the_nearest(toys: Registry[Toy]) -> None:
    with pytest.raises(UnknownNameError, match=r"no toy 'bal'. Did you mean 'ball'\? Known: ball"):
        toys.get("bal")
    with pytest.raises(LookupError, match="Did you mean 'sphere'"):
        toys.get("spher")


def test_names_take_wildcards(toys: Registry[Toy]) -> None:
    toys.register("square-2")(Square)
    toys.register("round-2")(Round)
    assert toys.names() == ["ball", "round-2", "square-2"]
    assert toys.names("*-2") == ["round-2", "square-2"]
    assert toys.names("*zip*") == []


def test_build_takes_every_form(toys: Registry[Toy]) -> None:
    toys.register("square")(Square)
    wanted = Square(colour="red", side=4)
    assert toys.build("square", colour="red", side=4) == wanted
    assert toys.build({"name": "square", "colour": "red", "side": 4}) == wanted
    assert toys.build({"name": "square", "colour": "red"}, side=4) == wanted
    assert toys.build(PartSpec(name="square", params={"colour": "red", "side": 4})) == wanted
    assert toys.build(Square, colour="red", side=4) == wanted
    assert toys.build(wanted) is wanted
    assert toys.build(PartSpec.parse(wanted)) is wanted
    assert toys.build(PartSpec.parse(Round)) == Round()
    assert toys.build(Round) == Round()  # an unregistered class works too


def test_build_refuses_what_is_no_part(toys: Registry[Toy]) -> None:
    toys.register("square")(Square)
    for wrong in (3, None, int, object()):
        with pytest.raises(InputError, match="allowed are a registered name"):
            toys.build(wrong)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(InputError, match="ready object"):
        toys.build(Square(colour="red"), side=2)
    with pytest.raises(SpecError, match="name is missing"):
        toys.build({"colour": "red"})
    with pytest.raises(SpecError, match="'side' is given twice"):
        toys.build({"name": "square", "colour": "red", "side": 1}, side=2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"colour": "red", "sidee": 1}, r"toy 'square': unknown parameter 'sidee'. Did you mean 'side'\?"),
        ({}, "the parameter 'colour' is missing"),
        ({"colour": "red", "side": 0}, "side: found 0; Input should be greater than or equal to 1"),
        ({"colour": "red", "side": "big"}, "side: found 'big'"),
    ],
)
def test_wrong_parameters_name_everything(toys: Registry[Toy], params: dict[str, Any], message: str) -> None:
    toys.register("square")(Square)
    with pytest.raises(SpecError, match=message) as caught:
        toys.build("square", **params)
    assert "Allowed parameters: side (int), colour (str)." in str(caught.value)
    with pytest.raises(SpecError):
        Square(**params)


def test_parts_are_frozen() -> None:
    part = Square(colour="red")
    with pytest.raises(ValueError, match="frozen"):
        part.side = 5  # type: ignore[misc]  # the point of the test


def test_describe(toys: Registry[Toy]) -> None:
    toys.register("square", aliases=("box",))(Square)
    info = toys.describe("box")
    assert (info.name, info.kind, info.aliases, info.summary) == ("square", "toy", ("box",), "A square toy.")
    assert info.source == __name__
    side, colour = info.parameters
    assert (side.name, side.type, side.default, side.description) == ("side", "int", "3", "edge length")
    assert (colour.name, colour.default) == ("colour", None)


def test_plugins_are_loaded_when_asked_for(toys: Registry[Toy], tmp_path: Path) -> None:
    plugin(tmp_path, "toy_plugin", {"kite": "toyplugin:Kite"}, GOOD)
    assert toys.names() == ["ball", "kite"]
    assert "toyplugin" not in sys.modules
    assert toys.build("kite", tail=5).tail == 5  # type: ignore[attr-defined]  # a plugin's class
    info = toys.describe("kite")
    assert (info.source, info.summary) == ("toy_plugin 1.2", "A kite.")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("toybroken:Kite", "a_module_that_does_not_exist"),
        ("toyplugin:Nothing", "Nothing"),
        ("toyplugin:Toy.model_config", "not a subclass"),
    ],
)
def test_a_broken_plugin_is_named_and_alone(toys: Registry[Toy], tmp_path: Path, value: str, reason: str) -> None:
    plugin(tmp_path, "bad_plugin", {"yo-yo": value}, GOOD | BAD)
    assert "yo-yo" in toys.names()
    assert toys.get("ball").__name__ == "Ball"
    with pytest.raises(PluginError, match=f"bad_plugin 1.2 offers the toy 'yo-yo'.*{reason}"):
        toys.get("yo-yo")
    info = toys.describe("yo-yo")
    assert info.source == "bad_plugin 1.2"
    assert reason in info.broken
    assert [toys.describe(name).broken == "" for name in toys.names()] == [True, False]


def test_two_plugins_with_one_name(toys: Registry[Toy], tmp_path: Path) -> None:
    plugin(tmp_path, "toy_a", {"kite": "toyplugin:Kite"}, GOOD)
    plugin(tmp_path, "toy_b", {"kite": "toyplugin:Kite"}, {})
    with pytest.raises(PluginError, match=r"offered by toy_[ab] 1.2 and toy_[ab] 1.2; uninstall"):
        toys.get("kite")


def test_builtins_win_over_plugins(toys: Registry[Toy], tmp_path: Path) -> None:
    plugin(tmp_path, "toy_plugin", {"ball": "toyplugin:Kite"}, GOOD)
    assert toys.get("ball").__name__ == "Ball"


def test_a_failing_builtin_is_not_hidden(toys: Registry[Toy], tmp_path: Path) -> None:
    (tmp_path / "toybox" / "bad.py").write_text("raise RuntimeError('bug')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bug"):
            toys.names()


@pytest.mark.parametrize(
    ("registry", "base", "some"),
    [
        (trio.SCORERS, "Scorer", {"objective-gradient", "last-token-attention", "random"}),
        (trio.SELECTORS, "Selector", {"nms", "top-k"}),
        (trio.COMPRESSORS, "Compressor", set()),
        (trio.ADAPTERS, "Adapter", {"llava"}),
        (trio.TOWERS, "Tower", {"clip", "siglip", "siglip2", "qwen-vl", "internvl", "dinov2", "open-clip", "timm"}),
    ],
)
def test_the_registries_of_the_package(registry: Registry[Any], base: str, some: set[str]) -> None:
    assert registry.base is getattr(trio, base)
    assert some <= set(registry.names())
    for name in registry.names():
        info = registry.describe(name)
        assert not info.broken
        assert info.source == "trio"
        assert info.summary
