"""Parts and families say themselves what they cost and what a search may vary: no table elsewhere names them."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

import trio
from trio import zoo
from trio.adapters import adapter_for
from trio.adapters.base import ADAPTERS
from trio.adapters.llava import LlavaAdapter
from trio.cli import app
from trio.core.flops import product
from trio.core.ops import first_k, ranking
from trio.core.part import Categorical, Choice, FloatRange, IntRange
from trio.cost import ModelShape, TowerShape, predict, published_shape, shape_of
from trio.encoders.compressors.base import COMPRESSORS, Compressor
from trio.encoders.reading.merge import keep, patches_only
from trio.encoders.towers.base import TOWERS, Tower
from trio.encoders.towers.clip import ClipTower
from trio.errors import UnsupportedModelError
from trio.measure.tuning.space import Space
from trio.scorers.base import SCORERS, Scorer
from trio.selectors.base import SELECTORS, Selector
from trio.testing import check_compressor, check_scorer, check_selector

ROOT = Path(trio.__file__).parent
PARTS = (SCORERS, SELECTORS, COMPRESSORS)


class FirstChannels(Scorer):
    """Length of the first channels of a hidden state.

    Parameters:
        channels: how many.
        squared: whether their squares are added up.
    """

    channels: Annotated[int, Field(ge=1)]
    squared: bool = False

    def score(self, ctx: Any) -> torch.Tensor:
        length = ctx.hidden[..., : self.channels].float().norm(dim=-1)
        return ctx.at_visual(length**2 if self.squared else length)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        return product(tokens, self.channels, 1)

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        return {"channels": IntRange(2, 8), "squared": Categorical((False, True))}


class Scaled(Selector):
    """The tokens with the highest saliencies.

    Parameters:
        weight: has the name of another selector's parameter, and another range.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0

    def select(self, ctx: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return first_k(ranking(ctx.saliency, ctx.valid), ctx.k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        return 1_000 * visual + keep

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        return {"weight": FloatRange(2.0, 4.0, digits=1, later=9.0)}


class FromTheTop(Compressor):
    """The first tokens.

    Parameters:
        skip: unused, but searched.
    """

    skip: Annotated[int, Field(ge=0)] = 0

    @patches_only
    def compress(self, tokens: Any, k: int) -> Any:
        return keep(tokens, torch.arange(k))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        return 7 * visual * keep

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        return {"skip": IntRange(3, 5)}


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three parts, registered as a user's file would, and gone afterwards."""
    for registry, name, cls in zip(
        PARTS, ("first-channels", "scaled", "from-the-top"), (FirstChannels, Scaled, FromTheTop), strict=True
    ):
        registry.names()
        for attribute in ("_parts", "_aliases", "_sources"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))
        registry.register(name)(cls)


class Dice:
    """A trial that draws at random, and holds that a name has one range."""

    def __init__(self, seed: int, ranges: dict[str, Any]) -> None:
        self.random, self.ranges = random.Random(seed), ranges

    def _once(self, name: str, values: Any) -> None:
        assert self.ranges.setdefault(name, values) == values, name

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self._once(name, tuple(choices))
        return self.random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        if name != "stages":  # at least one without a compressor
            self._once(name, (low, high))
        return self.random.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self._once(name, (low, high, log))
        return self.random.uniform(low, high)


# Parts from outside --------------------------------------------------------------------------------------------------


def test_parts_from_outside_are_counted(outside: None) -> None:
    stage = {"after_layer": 2, "keep": 10, "scorer": {"name": "first-channels", "channels": 3}, "selector": "scaled"}
    spec = {"version": 1, "compressor": {"name": "from-the-top", "keep": 100}, "stages": [stage]}
    made = predict(spec, published_shape("llava-1.5-7b"), images=(576,), text_tokens=60)
    assert made.compressed.flops.compression == 7 * 576 * 100
    assert made.compressed.flops.scoring == 2 * 160 * 3
    assert made.compressed.flops.selection == 100_010
    assert made.notes == []


def test_parts_from_outside_are_tuned(outside: None) -> None:
    model, _ = zoo.load("tiny-llava")
    space = Space.of(adapter_for(model))
    assert "first-channels" in space.scorers and "scaled" in space.selectors and "from-the-top" in space.compressors
    channels, squared, weights, skips = set(), set(), set(), set()
    ranges: dict[str, Any] = {}
    for seed in range(200):
        spec = space.draw(Dice(seed, ranges))
        if spec.compressor is not None and spec.compressor.name == "from-the-top":
            skips.add(spec.compressor.params["skip"])
        for number, one in enumerate(spec.stages):
            if one.scorer.name == "first-channels":
                channels.add(one.scorer.params["channels"])
                squared.add(one.scorer.params["squared"])
            if one.selector.name == "scaled" and number == 0:
                weights.add(one.selector.params["weight"])
            elif one.selector.name == "scaled":
                assert one.selector.params["weight"] == 9.0
    assert channels <= set(range(2, 9)) and len(channels) > 3 and squared == {False, True}
    assert len(weights) > 3 and all(2 <= weight <= 4 and round(weight, 1) == weight for weight in weights)
    assert skips == {3, 4, 5}


def test_parts_from_outside_are_listed(outside: None) -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0, result.stderr
    for name in ("first-channels", "scaled", "from-the-top"):
        assert f'"{name}"' in result.stdout
    assert "has the name of another selector's parameter" in result.stdout


def test_parts_from_outside_are_checked(outside: None) -> None:
    assert check_scorer(FirstChannels(channels=4)).passed
    assert check_selector("scaled").passed
    assert check_compressor("from-the-top").passed


def test_a_part_that_says_nothing_keeps_its_defaults_and_is_not_counted() -> None:
    class Silent(Scorer):
        """Says nothing."""

        def score(self, ctx: Any) -> torch.Tensor:
            raise AssertionError("never asked")

    assert Silent().flops(published_shape("llava-1.5-7b"), tokens=9, visual=5, keep=2) is None
    assert Silent.search_space() == {}


def test_search_spaces_are_parameters_within_their_ranges() -> None:
    for registry in PARTS:
        for name in registry.names():
            cls: Any = registry.get(name)
            space = cls.search_space() or {}
            for corner in (_corner(space, 0), _corner(space, -1)):
                assert {key: getattr(cls(**corner), key) for key in corner} == corner, name


def _corner(space: Mapping[str, Choice], end: int) -> dict[str, Any]:
    """The first or the last value of every parameter."""
    return {
        key: one.options[end] if isinstance(one, Categorical) else (one.low, one.high)[end]
        for key, one in space.items()
    }


# A family from outside -----------------------------------------------------------------------------------------------


class MyVisionConfig(CLIPVisionConfig):
    model_type = "my_vision"


class MyConfig(LlavaConfig):
    model_type = "my_vlm"


class MyTower(ClipTower):
    """A tower of one's own."""

    model_types = frozenset({"my_vision"})

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        return super().cost_shape(config).model_copy(update={"gated": True})


class MyAdapter(LlavaAdapter):
    """A family of one's own."""

    model_types = frozenset({"my_vlm"})


def test_a_family_from_outside_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MyConfig(text_config=LlamaConfig(num_hidden_layers=2))
    config.vision_config = MyVisionConfig()
    with pytest.raises(UnsupportedModelError, match=r"'my_vlm'.*no adapter says.*internvl.*Write Adapter.cost_shape"):
        shape_of(config)
    for registry, name, cls in ((TOWERS, "mine", MyTower), (ADAPTERS, "mine", MyAdapter)):
        registry.names()
        for attribute in ("_parts", "_aliases", "_sources"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))
        registry.register(name)(cls)  # type: ignore[type-var]  # a registry of each kind in turn
    shape = shape_of(config)
    assert (shape.name, shape.layers) == ("my_vlm", 2)
    assert shape.tower is not None and shape.tower.gated and shape.tower.crop_tokens == 49


def test_adapters_and_towers_that_do_not_say_what_they_cost() -> None:
    class Mute(MyTower):
        cost_shape = Tower.cost_shape

    with pytest.raises(UnsupportedModelError, match=r"cost_shape"):
        Mute.cost_shape(MyVisionConfig())


# No tables elsewhere -------------------------------------------------------------------------------------------------

FOLDERS = ("cost", "measure/tuning")
#: The import name, and a word of Python's own library.
COMMON = {"trio", "random"}


def registered() -> tuple[set[str], set[str]]:
    """All registered names, aliases and types of configurations; names of the classes."""
    names: set[str] = set()
    classes: set[str] = set()
    for registry in (*PARTS, ADAPTERS, TOWERS):
        for name in registry.names():
            cls: Any = registry.get(name)
            names |= {name, *registry.describe(name).aliases, *getattr(cls, "model_types", ())}
            classes.add(cls.__name__)
    return names, classes


def words(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, text) of the string constants and identifiers of a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "string", node.value
        for attribute in ("id", "attr", "name", "arg", "asname", "module"):
            text = getattr(node, attribute, None)
            if isinstance(text, str):
                yield "identifier", text


def mentions(source: str) -> set[str]:
    """Methods and families that a source names."""
    names, classes = registered()
    found = set()
    for kind, text in words(ast.parse(source)):
        if kind == "string" and text in names - {"trio"}:
            found.add(text)
        elif kind == "identifier":
            inside = "_" + text.replace(".", "_").strip("_") + "_"
            found |= {name for name in names - COMMON if f"_{name.replace('-', '_').replace('.', '_')}_" in inside}
            found |= {text} & classes
    return found


@pytest.mark.parametrize("file", [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))], ids=str)
def test_cost_and_tuning_name_no_method_and_no_family(file: Path) -> None:
    assert not mentions(file.read_text(encoding="utf-8"))


def test_mentions_are_found() -> None:
    lines = ['x = {"nms": 1}', "def soft_nms_flops(): ...", "from trio.scorers.last_token_attention import f", "TopK"]
    assert mentions("\n".join(lines)) >= {"nms", "soft-nms", "last-token-attention", "TopK"}
    assert not mentions('"""Soft nms."""\nimport random\nstudy = "trio"')
