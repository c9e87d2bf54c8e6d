"""What every registered part, tower and adapter says that it costs, against the operators that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.library_towers import MODELS, pixels
from support.memory import flops
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trio.adapters import families
from trio.adapters.base import ADAPTERS, Adapter
from trio.core.shape import ModelShape, TowerShape
from trio.core.tokens import ImageTokens, Signal, VisualTokens
from trio.cost import predict
from trio.cost.encoder import reading_flops, rows_by_layer
from trio.cost.flops import tower_flops
from trio.encoders.compressors.base import COMPRESSORS
from trio.encoders.reading.reader import Reader
from trio.encoders.towers import tower_for, tower_shape
from trio.encoders.towers.base import TOWERS, Tower
from trio.errors import UnsupportedModelError
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS

SIDE, WIDTH, HEADS, HIDDEN = 6, 24, 3, 40
PATCHES = SIDE**2
TOWER = TowerShape(
    layers=4, hidden=WIDTH, intermediate=44, patch_values=12, cls_tokens=1, crop_patches=PATCHES, heads=HEADS
)
#: A projector of one matrix, which is easy to take off a sum.
SHAPE = ModelShape(
    name="small", layers=2, hidden=HIDDEN, intermediate=8, heads=2, kv_heads=2, head_dim=20, vocab=5,
    projector=((WIDTH, HIDDEN),), tower=TOWER,
)  # fmt: skip


@pytest.mark.parametrize("registry", [SCORERS, SELECTORS, COMPRESSORS], ids=lambda registry: registry.kind)
def test_every_registered_part_says_what_it_costs(registry: Any) -> None:
    for name in registry.names():
        cost = registry.build({"name": name}).flops(SHAPE, tokens=50, visual=PATCHES, keep=9)
        assert isinstance(cost, int) and cost >= 0, name


# Compressors ---------------------------------------------------------------------------------------------------------


def tokens(compressor: Any) -> VisualTokens:
    """An image's tokens with the signals that a compressor reads."""
    draw = torch.Generator().manual_seed(0)
    width = WIDTH if compressor.space == "tower" else HIDDEN
    shapes = {"attention": (PATCHES,), "keys": (PATCHES, HEADS, WIDTH // HEADS)}
    signals = {one: torch.rand(shapes[one.kind], generator=draw) for one in compressor.reads()}
    features = torch.randn(PATCHES, width, generator=draw)
    return VisualTokens.start(features, ImageTokens.from_grid(SIDE, SIDE), signals)


def counted(compressor: Any, k: int) -> tuple[int, int]:
    """FLOPs of `compress`, and the number of tokens left."""
    given, left = tokens(compressor), []
    return flops(lambda: left.append(compressor.compress(given, k))), left[0].tokens


@pytest.mark.parametrize("keep", [1, 5, 16, 35])
@pytest.mark.parametrize(
    "params", [{}, {"remove": 1}, {"remove": 100}, {"important": 0.0}, {"important": 1.0}], ids=str
)
def test_vispruner_runs_the_operators_that_it_says(params: dict[str, Any], keep: int) -> None:
    compressor = COMPRESSORS.build({"name": "vispruner", **params})
    assert counted(compressor, keep) == (compressor.flops(SHAPE, tokens=PATCHES, visual=PATCHES, keep=keep), keep)


@pytest.mark.parametrize("keep", [1, 5, 16, 35])
def test_divprune_runs_the_operators_that_it_says(keep: int) -> None:
    compressor = COMPRESSORS.build("divprune")
    assert counted(compressor, keep) == (compressor.flops(SHAPE, tokens=PATCHES, visual=PATCHES, keep=keep), keep)


@pytest.mark.parametrize("params", [{}, {"share": 0.2}, {"plus": True}, {"share": 0.3, "rest": False}], ids=str)
def test_prumerge_runs_the_operators_that_it_says(params: dict[str, Any]) -> None:
    compressor = COMPRESSORS.build({"name": "prumerge", **params})
    ran, left = counted(compressor, PATCHES)
    said = compressor.flops(SHAPE, tokens=PATCHES, visual=PATCHES, keep=left)
    assert ran == said - 2 * left * WIDTH * HIDDEN
    assert 1 < left < PATCHES


def test_tokens_that_a_mixing_projector_made_are_not_projected_again() -> None:
    mixing = SHAPE.model_copy(update={"tower": TOWER.model_copy(update={"crop_patches": None, "patches_per_token": 4})})
    for name in ("prumerge", "tome"):
        compressor = COMPRESSORS.build(name)
        said = [compressor.flops(shape, tokens=9, visual=9, keep=3) for shape in (SHAPE, mixing)]
        features = 2 * 3 * 9 * (HIDDEN - WIDTH) if name == "prumerge" else 0
        assert said[0] - said[1] == 2 * 3 * WIDTH * HIDDEN - features


# Merging inside the tower --------------------------------------------------------------------------------------------


def clip() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=44, num_hidden_layers=4, num_attention_heads=HEADS, image_size=12,
        patch_size=2,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("merges", [None, 1, 4, 30])
@pytest.mark.parametrize("keep", [1, 7, 20, 36])
def test_a_tower_that_merges_runs_the_operators_that_are_predicted(layer: int, merges: int | None, keep: int) -> None:
    """Besides: means of groups, twice in each layer that merges (a product with a matrix of weights, not counted)."""
    model, images = clip(), pixels(0, 1, 12)
    shape, signals = tower_shape(model.config), (Signal("groups", layer, merges=merges),)

    def run() -> None:
        with Reader(tower_for(model), signals, keep=lambda _: keep) as reader:
            model(images)
            reader.take()

    rows = rows_by_layer(shape, signals, lambda _: keep)
    assert len(rows) == layer % 4 + 1
    gone = [(after, before - after) for before, after in rows if after < before]
    # The mean of hidden states, and of a column of sizes, in front of the feed-forward layer and behind the block;
    # the sizes are summed once more.
    means = sum(2 * 2 * after * moved * (WIDTH + 1) + 2 * after * moved for after, moved in gone)
    said = tower_flops(shape, PATCHES, rows) + reading_flops(shape, PATCHES, signals, lambda _: keep)
    assert flops(run) - means == said
    assert flops(lambda: model(images)) == tower_flops(shape, PATCHES)


def test_tome_makes_the_tower_cheaper_in_a_prediction() -> None:
    made = predict({"version": 1, "compressor": {"name": "tome", "keep": 9}}, SHAPE, images=(PATCHES,), text_tokens=4)
    rows = [(37, 28), (28, 19), (19, 10)]
    assert made.compressed.flops.tower == tower_flops(TOWER, PATCHES, rows) < made.full.flops.tower
    compared = sum(2 * ((before + 1) // 2) * (WIDTH // HEADS) * (before // 2) for before, _ in rows)
    assert made.compressed.flops.compression == compared + 2 * 9 * WIDTH * HIDDEN
    assert made.notes == []
    blind = SHAPE.model_copy(update={"tower": TOWER.model_copy(update={"heads": None})})
    (note,) = predict({"version": 1, "compressor": {"name": "tome", "keep": 9}}, blind, images=(PATCHES,)).notes
    assert "'tome'" in note and "heads" in note


def test_tome_behind_the_tower_counts_its_rounds() -> None:
    """Three of 36 go in each of 3 layers, 27 come out; 9 are wanted: 13 of them go, then 5."""
    compressor = COMPRESSORS.build({"name": "tome", "r": 3})
    said = compressor.flops(SHAPE, tokens=PATCHES, visual=PATCHES, keep=9)
    assert said == 2 * WIDTH * (14 * 13 + 7 * 7) + 2 * 9 * WIDTH * HIDDEN


# Towers and adapters -------------------------------------------------------------------------------------------------


def dinov2(**more: Any) -> Callable[[], Any]:
    def make() -> Any:
        name = "Dinov2WithRegisters" if "num_register_tokens" in more else "Dinov2"
        config = getattr(transformers, f"{name}Config")(
            hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, image_size=12, patch_size=2, **more
        )
        return getattr(transformers, f"{name}Model")(config).eval()

    return make


@pytest.mark.parametrize("more", [{}, {"num_register_tokens": 3}, {"use_swiglu_ffn": True}, {"mlp_ratio": 2}], ids=str)
def test_dinov2_runs_the_operators_that_its_configuration_says(more: dict[str, Any]) -> None:
    model = dinov2(**more)()
    model.set_attn_implementation("eager")
    shape = tower_shape(model.config)
    assert flops(lambda: model(pixels(0, 2, 12))) == tower_flops(shape, 2 * PATCHES)
    assert shape == tower_shape(model)


@pytest.mark.parametrize("head", [True, False])
def test_siglip2_runs_the_operators_that_its_configuration_says(head: bool) -> None:
    """Without what resizes its positions, which is a matrix product on some releases."""
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=44, num_hidden_layers=3, num_attention_heads=HEADS, patch_size=2,
        num_patches=16, vision_use_head=head,
    )  # fmt: skip
    model: Any = transformers.Siglip2VisionModel(config).eval()
    model.set_attn_implementation("eager")
    grid = torch.tensor([[4, 6]])
    images = {
        "pixel_values": torch.randn(1, 24, 12),
        "pixel_attention_mask": torch.ones(1, 24, dtype=torch.long),
        "spatial_shapes": grid,
    }
    positions = model.get_submodule("embeddings" if hasattr(model, "embeddings") else "vision_model.embeddings")
    table = positions.position_embedding.weight.detach().reshape(4, 4, -1)
    resizing = flops(lambda: positions.resize_positional_embeddings(table, grid, 24))
    ran = math_flops(lambda: model(**images))
    assert ran - resizing == tower_flops(tower_shape(config), 24)


def math_flops(call: Callable[[], Any]) -> int:
    """FLOPs of a call whose attention is made of matrix products."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return flops(call)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", MODELS)
def test_towers_of_libraries_run_the_operators_that_their_weights_say(name: str) -> None:
    """Without what pools: only what runs up to the last block is counted."""
    tower = tower_for(MODELS[name]())
    side = 160 if name == "open_clip timm" else 32
    blocks: list[int] = []

    class Ended(Exception):
        """The last block has run."""

    def end(*_: Any) -> None:
        raise Ended

    tower.blocks[-1].register_forward_hook(end)

    def run() -> None:
        with pytest.raises(Ended):
            tower.run(pixels(0, 2, side))
        blocks.append(1)

    shape = tower_shape(tower.module)
    said = sum(tower_flops(shape, rows * columns) for rows, columns in tower.grids(pixels(0, 2, side)))
    assert math_flops(run) == said and blocks
    assert shape.prefix == tower.prefix and bool(shape.cls_tokens) == tower.has_cls


def test_weights_of_other_sizes_are_refused() -> None:
    model = MODELS["timm"]()
    model.blocks[1].mlp.fc1 = nn.Linear(64, 100)
    with pytest.raises(UnsupportedModelError, match="its blocks differ in size"):
        tower_shape(model)
    model = MODELS["open_clip"]()
    for block in model.visual.transformer.resblocks:
        block.mlp.c_fc = nn.Linear(32, 200)
    with pytest.raises(UnsupportedModelError, match="two or three of one width"):
        tower_shape(model)


def test_every_registered_tower_says_what_it_costs() -> None:
    """By the types of its configurations, or by a module where its library has none."""
    plain: Any = Tower.cost_shape
    for name in TOWERS.names():
        cls: Any = TOWERS.get(name)
        assert cls.cost_shape.__func__ is not plain.__func__, name
        assert cls.model_types or name in ("timm", "open-clip"), name


def test_every_registered_adapter_says_what_its_models_cost_or_why_not() -> None:
    plain: Any = Adapter.cost_shape
    known = families()
    for name in ADAPTERS.names():
        cls: Any = ADAPTERS.get(name)
        assert cls.cost_shape.__func__ is not plain.__func__ and cls.model_types, name
        assert set(cls.model_types) <= set(known), name
    generic: Any = ADAPTERS.get("generic")
    with pytest.raises(UnsupportedModelError, match="cost_shape"):
        generic.cost_shape(transformers.PaliGemmaConfig())
