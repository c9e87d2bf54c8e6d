"""`trio.encoders.compress`: three lines from a tower to compressed features, on every kind of tower."""

from __future__ import annotations

import pytest
import torch
from support.library_towers import MODELS, pixels
from support.towers import TOWERS

import trio
from trio import zoo
from trio.core.images import inputs_for, load_image
from trio.core.tokens import CLS, Signal, VisualTokens
from trio.encoders import compress
from trio.encoders.compressors.base import Compressor
from trio.encoders.reading.merge import keep as keep_tokens
from trio.encoders.reading.reader import Reader
from trio.encoders.towers import tower_for
from trio.errors import InputError, UnknownNameError, UnsupportedModelError
from trio.integrations.embeddings import export_embeddings


class Loudest(Compressor):
    """The tokens with the longest features, which it checks to be hidden states of the block asked for."""

    def reads(self) -> tuple[Signal, ...]:
        return (Signal("keys", -1),)

    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        assert tokens.signals[self.reads()[0]].shape[0] == tokens.tokens
        return keep_tokens(tokens, tokens.features.norm(dim=1).topk(k).indices.sort().values)


@pytest.mark.parametrize("name", [name for name in TOWERS if not TOWERS[name].packed])
def test_towers_of_transformers(name: str):
    case = TOWERS[name]
    module, images = case.make("sdpa"), case.images(0)
    with torch.no_grad():
        results = compress(module, images, Loudest(), keep=6)
        states = module(**images, output_hidden_states=True).hidden_states
    tower = tower_for(module)
    grids = tower.grids(images)
    assert [len(result.merge_map) for result in results] == [rows * columns for rows, columns in grids]
    for number, result in enumerate(results):
        n = grids[number][0] * grids[number][1]
        # Hidden states begin with the embeddings: the last but d is that of block -d. The last one may be normalised.
        block = states[len(tower.blocks) + 1 + tower.features_block]
        rows = block[number, case.prefix : case.prefix + n]
        if tower.features_block == -1:
            with Reader(tower, [Signal("hidden", -1)]) as reader, torch.no_grad():
                module(**images)
                rows = reader.take().values[Signal("hidden", -1)].split([a * b for a, b in grids])[number]
        loudest = rows.norm(dim=1).topk(6).indices.sort().values
        assert torch.equal(result.features, rows[loudest]) and torch.equal(result.token_index, loudest)
        assert result.origins.grids == (grids[number],)
        assert torch.equal(result.origins.row * grids[number][1] + result.origins.column, loudest)


@pytest.mark.parametrize("name", [name for name in TOWERS if TOWERS[name].packed])
def test_packed_towers_give_tokens_of_several_patches(name: str):
    case = TOWERS[name]
    module, images = case.make("sdpa"), case.images(0)
    arguments = {"pixel_values": images["hidden_states"], "grid_thw": images["grid_thw"]}
    with torch.no_grad():
        results = compress(module, arguments, Loudest(), keep="50%")
        merged = module(**images).pooler_output
    frames = [(8, 12), (6, 8), (6, 8), (2, 4)]
    first = 0
    for result, (rows, columns) in zip(results, frames, strict=True):
        n = rows * columns // 4
        own = merged[first : first + n]
        loudest = own.norm(dim=1).topk(round(n / 2)).indices.sort().values
        assert torch.equal(result.features, own[loudest])
        assert result.origins.grids == ((rows // 2, columns // 2),) and set(result.origins.size.tolist()) == {4}
        first += n
    with pytest.raises(InputError, match="leave layer out"):
        compress(module, arguments, Loudest(), keep=3, layer=-2)
    with pytest.raises(InputError, match="grid_thw"):
        compress(module, torch.randn(2, 3, 8, 8), Loudest(), keep=3)


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_and_timm_in_three_lines(name: str):
    model, images = MODELS[name](), pixels(0)
    with torch.no_grad():
        results = trio.encoders.compress(model, images, {"name": "visionzip", "keep": 3, "contextual": 1})
    has_cls = tower_for(model).has_cls
    assert len(results) == len(images)
    for result in results:
        assert result.tokens == 3 and result.features.shape[0] == 3
        assert (int(result.origins.kind[0]) == CLS) == has_cls
        # The class token stands for one token, the others for all patches but the one that it took the place of.
        assert float(result.sizes.sum()) == len(result.merge_map) + has_cls and int(result.merge_map.min()) >= 0
    alone = [compress(model, image[None], {"name": "visionzip", "keep": 3, "contextual": 1})[0] for image in images]
    for together, single in zip(results, alone, strict=True):
        assert torch.equal(together.merge_map, single.merge_map) and together.seed == single.seed
        torch.testing.assert_close(together.features, single.features.detach(), atol=1e-5, rtol=1e-5)


def test_the_projector_runs_before_or_after_as_the_compressor_asks():
    module, images = TOWERS["clip"].make("sdpa"), TOWERS["clip"].images(0)["pixel_values"]
    seen: list[torch.Tensor] = []

    def project(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows)
        return rows[:, :5] * 2

    class InLanguage(Loudest):
        space = "language"

    with torch.no_grad():
        after = compress(module, images, Loudest(), keep=4, project=project)
        assert [len(rows) for rows in seen] == [12]  # all images in one call
        seen.clear()
        before = compress(module, images, InLanguage(), keep=4, project=project)
        assert [len(rows) for rows in seen] == [75]
        seen.clear()
        plain = compress(module, images, Loudest(), keep=4)
        zipped = compress(module, images, "visionzip-4", project=project)
    assert torch.equal(after[0].features, plain[0].features[:, :5] * 2)
    assert before[0].features.shape == (4, 5) and zipped[0].features.shape == (4, 5)


@pytest.mark.parametrize(
    "named",
    [
        *("visionzip", "scan", "vispruner", "divprune", "tome", "average-pool", "uniform-grid"),
        *({"share": 0.1}, {"share": 0.1, "neighbours": 3}, {"plus": True}),  # of prumerge
    ],
    ids=str,
)
def test_a_pipeline_gives_the_language_model_the_features_of_compress(named):
    """Whatever a compressor does to a token's features reaches the language model, also where nothing was merged."""
    model, processor = zoo.load("tiny-llava")
    model = model.float()
    image = load_image(zoo.demo_image())
    spec = {"name": "prumerge", **named} if isinstance(named, dict) else {"name": named, "keep": 16}
    if named == "scan":
        spec |= {"window": 4, "local_layer": 1, "global_layer": -2}
    values = inputs_for(processor, [image], "?")["pixel_values"]
    with torch.no_grad():
        (left,) = compress(model.model.vision_tower, values, spec, project=model.model.multi_modal_projector)
    (rows,) = export_embeddings(model, processor, [image], {"compressor": spec, "positions": "compact"})
    torch.testing.assert_close(rows, left.features, rtol=1e-5, atol=1e-4)


def test_the_forms_of_a_compressor_and_its_count():
    module, images = TOWERS["clip"].make("sdpa"), TOWERS["clip"].images(0)["pixel_values"]
    with torch.no_grad():
        named = compress(module, images, "visionzip-8")
        for given, keep in (("visionzip", 8), ({"name": "visionzip", "keep": 8}, None), ("visionzip", "32%")):
            again = compress(module, images, given, keep=keep)
            assert all(torch.equal(a.features, b.features) for a, b in zip(named, again, strict=True))
        assert [result.tokens for result in compress(module, images, "visionzip-999")] == [25] * 3
        decided = compress(module, images, "prumerge")
        assert all(1 <= result.tokens <= 25 for result in decided)
    for given, keep, message in (
        ("visionzip", None, "keep: missing"),
        ("visionzip", 0, "count of 1 or more"),
        ("visionzip", "0%", "above 0%"),
        ("visionzip", "many", "percentage such as"),
        ({"name": "visionzip", "keep": 3}, 3, "given twice"),
        ("prumerge", 3, "decides its own count"),
    ):
        with pytest.raises(InputError, match=message):
            compress(module, images, given, keep=keep)
    with pytest.raises(UnknownNameError, match=r"visionzap.*number of tokens"):
        compress(module, images, "visionzap-64")
    with pytest.raises(UnsupportedModelError, match="block 9"):
        compress(module, images, {"name": "visionzip", "layer": 9}, keep=3)
    with pytest.raises(InputError, match="give pixels"):
        compress(module, images[0], "visionzip-8")
