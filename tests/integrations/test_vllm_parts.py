"""The vLLM plugin's parts that need no vLLM: specs of engines and requests, layouts, positions, exported embeddings."""

from __future__ import annotations

import dataclasses
import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import trio
from trio import zoo
from trio.adapters.tiles import tiled_image, tiled_patches
from trio.core.images import inputs_for, load_image
from trio.core.tokens import ImageTokens, Signal
from trio.encoders import compress, compress_features
from trio.encoders.reading.reader import Reader
from trio.encoders.towers.find import tower_for
from trio.errors import InputError, TrioError, UnsupportedModelError
from trio.integrations.embeddings import export_embeddings
from trio.integrations.vllm import TESTED, encoding
from trio.integrations.vllm.encoding import EncodedItem, compress_items
from trio.integrations.vllm.mrope import placed, prompt_positions, split_places, with_places
from trio.integrations.vllm.settings import ServedFamily, ServedTower, pieces_of, read_spec, without_newlines

LLAVA = ServedFamily("LLaVA", "compact", "vLLM numbers them without gaps", tower=ServedTower(24, 23))
NEXT = ServedFamily("LLaVA-NeXT", "compact", "vLLM numbers them without gaps", True, ServedTower(24, 23))
QWEN = ServedFamily("Qwen-VL", "original", "positions have rows and columns", tower=ServedTower(8, 8, (3, 5)))
OTHER = ServedFamily("LLaVA", "compact", "", tower=ServedTower(why="it is a 'siglip_vision_model'"))
DIVPRUNE: dict[str, Any] = {"compressor": {"name": "divprune", "keep": 16}}

# Specs


def test_one_spec_has_one_text_however_it_is_written():
    written: list[Any] = [
        "divprune-16",
        {**DIVPRUNE, "positions": "auto"},
        {**DIVPRUNE, "positions": "compact", "name": "mine", "description": "x"},
        json.dumps({**DIVPRUNE, "positions": "compact"}),
        trio.PipelineSpec(compressor={"name": "divprune", "keep": 16}, positions="compact"),
    ]
    specs = [read_spec(one, LLAVA) for one in written]
    assert len({spec.text for spec in specs if spec}) == 1
    again = read_spec(specs[0].text, LLAVA)
    assert again is not None and again.text == specs[0].text
    other = read_spec("divprune-17", LLAVA)
    assert other is not None and other.text != specs[0].text
    assert read_spec(None, LLAVA) is None and read_spec("none", LLAVA) is None


@pytest.mark.parametrize(
    ("spec", "family", "match"),
    [
        ("trio-11", LLAVA, "inside the language model"),
        (DIVPRUNE, LLAVA, "positions: found 'original'; vLLM numbers them without gaps"),
        ({**DIVPRUNE, "positions": "compact"}, QWEN, "positions: found 'compact'"),
        ("tome-16", LLAVA, "was not tested in this engine; tested are average-pool, divprune"),
        ("random-16", LLAVA, "no seed is written"),
        ({"compressor": {"name": "prumerge"}, "positions": "auto"}, LLAVA, "known only when the image has been"),
        (
            {"compressor": {"name": "prumerge", "share": 0.1, "plus": True}, "positions": "auto"},
            LLAVA,
            "write its `share` without `plus`",
        ),
        (
            {"compressor": {"name": "prumerge", "share": 0.1}, "positions": "auto"},
            LLAVA,
            r"block -1 of the vision tower: the engine loads the first 23 of 24 blocks.*Write layer: -2",
        ),
        ("visionzip-16", OTHER, "reads attention of block -2 of the vision tower: it is a 'siglip_vision_model'"),
        (
            {"compressor": {"name": "vispruner", "keep": 16, "layer": -2}, "positions": "auto"},
            QWEN,
            "the tower has 8 blocks, and none from there on that sees a whole image",
        ),
        (
            {"compressor": {"name": "vispruner", "keep": 16, "layer": 24}, "positions": "auto"},
            LLAVA,
            "the tower has 24 blocks",
        ),
        ({"compressor": {"name": "visionzip"}, "positions": "auto"}, LLAVA, "keep"),
        ({**DIVPRUNE, "positions": "auto"}, NEXT, "newlines: found 'with-row'"),
        (
            {"compressor": {"name": "divprune", "keep": 16, "split": "saliency"}, "positions": "auto"},
            LLAVA,
            "which this engine does not do",
        ),
        ({"compressor": {"name": "divprune", "keep": {"count": 9, "per": "sample"}}}, QWEN, "per: image"),
        ("divprun-16", LLAVA, "no shipped spec 'divprun-16'"),
        (3, LLAVA, "found int; give a name"),
        ("{", LLAVA, "no JSON object"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(spec, family, match):
    with pytest.raises(TrioError, match=match):
        read_spec(spec, family)


@pytest.mark.parametrize("family", [LLAVA, NEXT, QWEN, OTHER])
@pytest.mark.parametrize("share", [75, 50, 33, 22, 11])
def test_the_shipped_specs_for_engines_are_served_by_every_family(share, family):
    assert read_spec(f"engine-divprune-{share}", family).counts([200]) == [
        {75: 150, 50: 100, 33: 67, 22: 44, 11: 22}[share]
    ]


def test_counts_are_those_of_the_schedule():
    share, count, tile = (
        read_spec({"compressor": {"name": "divprune", "keep": keep}, "positions": "auto"}, LLAVA)
        for keep in ("25%", 16, {"count": 5, "per": "tile"})
    )
    assert share.counts([144]) == [36] and count.counts([9]) == [9] and count.counts([100, 60]) == [10, 6]
    assert tile.counts([144, 3]) == [5, 3]


@pytest.mark.parametrize(("share", "rest"), [(0.1, True), (0.1, False), (0.004, True), (1.0, True)])
def test_a_compressor_that_decides_its_count_leaves_what_it_says_before(share, rest):
    name = {"name": "prumerge", "share": share, "rest": rest, "layer": -2, "neighbours": 3}
    read = read_spec({"compressor": name, "positions": "auto"}, LLAVA)
    torch.manual_seed(0)
    attention, keys = read.compressor.reads()
    for tokens in (9, 100, 144):
        signals = {attention: torch.rand(tokens), keys: torch.randn(tokens, 2, 4)}
        (left,) = compress_features(
            [torch.randn(tokens, 8)], ImageTokens.from_grid(1, tokens), read.compressor, signals=[signals]
        )
        assert read.counts([tokens]) == [left.tokens]


# Encoding


def test_images_are_compressed_as_the_pipeline_does():
    model, processor = zoo.load("tiny-llava")
    image = load_image(zoo.demo_image())
    images = [image, image.rotate(90), image.resize((90, 200))]
    read = read_spec("divprune-16", LLAVA)
    with torch.no_grad():
        pixels = torch.cat([inputs_for(processor, [one], "?")["pixel_values"] for one in images])
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        grid = ImageTokens.from_grid(12, 12)
        items = [
            EncodedItem(read, grid, [torch.arange(144)], rows, [one]) for rows, one in zip(hidden, pixels, strict=True)
        ]
        found = compress_items(items, model.model.multi_modal_projector)
        pipeline = trio.Pipeline.from_spec({**DIVPRUNE, "positions": "auto"}, model)
        with pipeline:
            for one, left in zip(images, found, strict=True):
                model(**inputs_for(processor, [one], "?"))
                assert left.indices.tolist() == pipeline.report.samples[0].compressor.images[0].indices
    torch.testing.assert_close(found[0].features, model.model.multi_modal_projector(hidden[0])[found[0].indices])


def test_random_tokens_depend_on_the_pixels_alone():
    read = read_spec({"compressor": {"name": "random", "keep": 5, "seed": 3}, "positions": "auto"}, LLAVA)
    grid, rows = ImageTokens.from_grid(4, 4), torch.randn(3, 16, 8)
    pixels = torch.randn(3, 3, 8, 8)
    every = [torch.arange(16)]
    seen = zip(rows, (pixels[0], pixels[1], pixels[0]), strict=True)
    items = [EncodedItem(read, grid, every, row, [one]) for row, one in seen]
    first, second, third = (one.indices.tolist() for one in compress_items(items, None))
    assert first == third != second


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_class_tokens_take_the_places_that_the_pipeline_gives_them(name):
    model, processor = zoo.load(name)
    spec = {"compressor": {"name": "visionzip", "keep": 20}, "positions": "auto", "newlines": "never"}
    family = NEXT if name == "tiny-llava-next" else LLAVA
    read = read_spec(spec, family)
    image = load_image(zoo.demo_image()).resize((200, 90))
    inputs = inputs_for(processor, [image], "?")
    pipeline = trio.Pipeline.from_spec(spec, model)
    with pipeline, torch.no_grad():
        model(**inputs)
    kept = pipeline.report.samples[0].compressor.images[0].indices
    tower = tower_for(model.model.vision_tower)
    pixels = inputs["pixel_values"].flatten(0, 1) if name == "tiny-llava-next" else inputs["pixel_values"]
    wanted = [*read.compressor.reads(), Signal("hidden", -2), Signal("cls", -2)]
    with torch.no_grad(), Reader(tower, wanted) as reader:
        tower.run(pixels)
        values = reader.take().values
        if name == "tiny-llava-next":
            side = model.config.vision_config.image_size // model.config.vision_config.patch_size
            size, tile = tuple(inputs["image_sizes"][0].tolist()), model.config.vision_config.image_size
            points = model.config.image_grid_pinpoints
            own = without_newlines(tiled_image(size, points, tile=tile, side=side))
            patches = tiled_patches(own, size, points, tile=tile, side=side)
            pieces, index = pieces_of(patches.tile), patches.patches[:, 0]
        else:
            own, index = ImageTokens.from_grid(12, 12), torch.arange(144)
            pieces = [index]
        item = EncodedItem(
            spec=read,
            image=own,
            pieces=pieces,
            features=values[Signal("hidden", -2)][index],
            pixels=list(pixels),
            signals={signal: values[signal][index] for signal in read.compressor.reads()},
            class_tokens=values[Signal("cls", -2)],
        )
        (left,) = compress_items([item], model.model.multi_modal_projector)
    assert left.indices.tolist() == kept and len(kept) == 20
    (rows,) = export_embeddings(model, processor, [image], spec)
    torch.testing.assert_close(left.features, rows)


def test_further_features_are_the_mean_of_what_went_into_each_token():
    read = read_spec({"compressor": {"name": "average-pool", "keep": 4}, "positions": "auto"}, LLAVA)
    rows, later = torch.randn(16, 8), torch.randn(16, 6)
    every = [torch.arange(16)]
    item = EncodedItem(read, ImageTokens.from_grid(4, 4), every, rows, [torch.zeros(3, 8, 8)], later=later)
    (left,) = compress_items([item], None)
    (alone,) = compress_features([rows], ImageTokens.from_grid(4, 4), "average-pool-4")
    for at in range(4):
        group = alone.merge_map == at
        assert int(group.sum()) == 4
        torch.testing.assert_close(left.features[at], torch.cat([rows[group].mean(0), later[group].mean(0)]))
    dropping = read_spec("uniform-grid-4", LLAVA)
    (left,) = compress_items([dataclasses.replace(item, spec=dropping)], None)
    assert torch.equal(left.features, torch.cat([rows, later], 1)[left.indices])


def test_an_image_that_does_not_fill_its_place_is_an_error(monkeypatch):
    read = read_spec("uniform-grid-4", LLAVA)
    item = EncodedItem(read, ImageTokens.from_grid(4, 4), [torch.arange(16)], torch.randn(16, 8), [torch.zeros(1)])
    monkeypatch.setattr(encoding, "compress_tokens", lambda compressor, tokens, counts, project: tokens)
    with pytest.raises(InputError, match=r"left \[16\] tokens where the prompt has room for \[4\]"):
        compress_items([item], None)


def test_pieces_are_the_tokens_of_each_tile():
    pieces = pieces_of(torch.tensor([0, 0, 1, 2, 1, 2, 2]))
    assert [piece.tolist() for piece in pieces] == [[0, 1], [2, 4], [3, 5, 6]]


# Positions


def by_hand(parts: list[Any]) -> tuple[list[list[int]], list[int | None]]:
    """Positions of a prompt of texts (a number of tokens) and images (rows, columns, kept), token by token."""
    positions: list[list[int]] = []
    offset = 0
    for part in parts:
        if isinstance(part, int):
            positions += [[offset + n] * 3 for n in range(part)]
            offset += part
        else:
            rows, columns, kept = part
            whole = [[offset, offset + r, offset + c] for r in range(rows) for c in range(columns)]
            positions += [whole[index] for index in kept]
            offset += max(rows, columns)
    return positions, [offset]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_keep_their_positions_in_any_chunks(chunk, dtype):
    tall, wide, whole = (400, 3, [0, 5, 899, 1199]), (4, 6, [1, 9, 20]), (2, 2, [0, 1, 2, 3])
    parts: list[Any] = [4, tall, 3, whole, 2, wide, 5]
    image, text = 7, 1
    ids: list[int] = []
    grids, left, features = [], {}, []
    for part in parts:
        if isinstance(part, int):
            ids += [text] * part
            continue
        rows, columns, kept = part
        grids.append((len(ids), 1, rows, columns, 1.0))
        own = torch.zeros(len(kept), 8, dtype=dtype)
        if len(kept) < rows * columns:
            left[len(ids)] = len(kept)
            index = torch.tensor(kept)
            own = with_places(own, index // columns, index % columns)
        features.append(own)
        ids += [image] * len(kept)
    expected, (end,) = by_hand(parts)
    positions, delta = prompt_positions(len(ids), grids, left)
    assert delta == end - len(ids)
    texts = [at for at, one in enumerate(ids) if one == text]
    assert positions[:, texts].T.tolist() == [expected[at] for at in texts]  # before any image is encoded
    starts = [place for place, *_ in grids]
    for done in range(0, len(ids), chunk):
        places = []
        for start, rows in zip(starts, features, strict=True):
            part = rows[max(done - start, 0) : max(done + chunk - start, 0)]
            if not len(part):
                continue
            if part.shape[1] == 8:
                places.append(torch.full((len(part), 3), -1))
            else:
                places.append(split_places(part, 8)[1])
        positions = placed(torch.tensor(ids), (image, 9), positions, places, done)
    assert positions.T.tolist() == expected
    again = placed(torch.tensor(ids), (image, 9), positions, [split_places(features[0], 8)[1]], 0)
    assert torch.equal(again, positions)  # a request that is run again


# Embeddings


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_exported_embeddings_are_the_features_of_the_tokens_kept(name):
    model, processor = zoo.load(name)
    image = load_image(zoo.demo_image())
    spec = {**DIVPRUNE, "positions": "compact", "newlines": "never"}
    (rows,) = export_embeddings(model, processor, [image], spec)
    pipeline = trio.Pipeline.from_spec(spec, model)
    inputs = inputs_for(processor, [image], "another question")
    with pipeline, torch.no_grad():
        model(**inputs)
    kept = pipeline.report.samples[0].compressor.images[0].indices
    with torch.no_grad():
        arguments = {one: inputs[one] for one in ("pixel_values", "image_sizes") if one in inputs}
        whole = model.model.get_image_features(**arguments).pooler_output[0]
    if name == "tiny-llava-next":
        newline = model.model.image_newline.detach()
        whole = whole[[not torch.equal(row, newline) for row in whole]]
    torch.testing.assert_close(rows, whole[kept])


def test_centres_whose_neighbours_are_anothers_have_their_new_features_in_the_pipeline():
    model, processor = zoo.load("tiny-llava")
    image, name = load_image(zoo.demo_image()), {"name": "prumerge", "share": 0.1, "layer": -2}
    pixels = inputs_for(processor, [image], "?")["pixel_values"]
    with torch.no_grad():
        (left,) = compress(model.model.vision_tower, pixels, name, project=model.model.multi_modal_projector)
        whole = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    alone = torch.bincount(left.merge_map[left.merge_map >= 0], minlength=left.tokens) == 1
    assert not torch.allclose(left.features[alone], whole[left.token_index[alone]], atol=1)  # some changed all the same
    (rows,) = export_embeddings(model, processor, [image], {"compressor": name, "positions": "compact"})
    torch.testing.assert_close(rows, left.features)


def test_merging_compressors_export_too_and_stages_do_not():
    model, processor = zoo.load("tiny-llava")
    image = load_image(zoo.demo_image())
    first, second = export_embeddings(model, processor, [image, image.rotate(90)], "visionzip-20")
    assert first.shape == second.shape == (20, 160) and not torch.equal(first, second)
    with pytest.raises(UnsupportedModelError, match="inside the language model"):
        export_embeddings(model, processor, [image], "trio-11")
    with pytest.raises(UnsupportedModelError, match="positions: found 'original'"):
        export_embeddings(model, processor, [image], DIVPRUNE)
    qwen, processor = zoo.load("tiny-qwen2.5-vl")
    with pytest.raises(UnsupportedModelError, match="For Qwen-VL use the plugin"):
        export_embeddings(qwen, processor, [image], "divprune-16")


def test_the_project_says_where_the_plugin_is():
    project = tomllib.loads((Path(trio.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    place = project["entry-points"]["vllm.general_plugins"]["trio"]
    module, _, function = place.partition(":")
    assert getattr(importlib.import_module(module), function).__doc__
    low, high = (".".join(map(str, one)) for one in TESTED)
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={low},<{high}"]
