"""What is particular to a family: tiles and newlines, videos, DeepStack, the generic adapter's refusals."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers
from support.families import FAMILIES, IMAGE_TOKEN, PINPOINTS, SIDE, TILE, VIDEO_TOKEN, family
from support.models import text_config

import trio
import trio.adapters
from trio.adapters.tiles import best_resolution, tiled_image, unpadded
from trio.adapters.tiny_inputs import SIZES, noise, size_of
from trio.core.prompts import Prompt
from trio.core.tokens import CLS, NEWLINE, PATCH, ImageTokens
from trio.selectors.top_k import TopK

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore:no adapter knows")]
PROMPTS = [
    Prompt("what is", 1, "this thing or that"),
    Prompt("now", 2, "and", 3, "differ in what"),
    Prompt("no picture here at all"),
]


def stages(*pairs):
    return [trio.Stage(after_layer=after, keep=keep) for after, keep in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_is_found_and_one_spec_fits_all(name):
    model, make = family(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = trio.Pipeline.from_spec("trio-11", model)
    generic = pipeline.adapter_name == "generic"
    assert generic == any("no adapter knows" in str(warning.message) for warning in caught)
    assert generic or pipeline.adapter_name == {"qwen2-vl": "qwen-vl", "qwen2.5-vl": "qwen-vl"}.get(name, name)
    with pipeline, torch.no_grad():
        model(**make(PROMPTS))
    assert 0 < pipeline.report.retention < 0.6
    assert all(kept > 0 for sample in pipeline.report.kept_by_stage for kept in sample)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batches_equal_their_singles(name, side):
    """Different image sizes, image counts and a prompt without an image."""
    model, make = family(name)
    pipeline = trio.Pipeline(model, stages=stages((0, "60%"), (2, 3)))
    with pipeline, torch.no_grad():
        logits = model(**make(PROMPTS, side=side)).logits
        together = pipeline.report
        for place, prompt in enumerate(PROMPTS):
            alone = model(**make([prompt])).logits[0, -1]
            if prompt.images:
                ours = [[group.indices for group in s.groups] for s in together.samples[place].stages]
                assert ours == [[group.indices for group in s.groups] for s in pipeline.report.samples[0].stages]
            end = -1 if side == "left" else together.layer_tokens[place][-1] - 1
            torch.testing.assert_close(logits[place, end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_share_the_images_of_their_sample(name):
    """One image a prompt: transformers 5.17 mixes up several when it copies a prompt for its beams."""
    model, make = family(name)
    prompts = [PROMPTS[0], Prompt("now", 2, "alone"), PROMPTS[2]]
    with trio.Pipeline(model, stages=stages((1, 5), (3, 2))) as pipeline:
        beams = model.generate(**make(prompts), num_beams=3, max_new_tokens=4, do_sample=False)
        assert len(pipeline.report.samples) == 9
        for place, prompt in enumerate(prompts):
            alone = model.generate(**make([prompt]), num_beams=3, max_new_tokens=4, do_sample=False)
            assert torch.equal(beams[place, -4:], alone[0, -4:])


# Tiles and newlines


@pytest.mark.parametrize(
    "size", [*(size_of(n, TILE) for n in range(len(SIZES))), (500, 333), (1, 1000), (337, 336), (47, 48)]
)
@pytest.mark.parametrize("pinpoints", [PINPOINTS, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]])
def test_tiles_are_counted_as_transformers_counts_them(size, pinpoints):
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    assert best_resolution(size, pinpoints) == select_best_resolution(size, pinpoints)
    for rows, columns in ((4, 8), (48, 24), (24, 24), (8, 4)):
        assert unpadded(rows, columns, size) == tuple(unpad_image(torch.zeros(1, rows, columns), size).shape[1:])


def test_llava_next_has_2880_tokens_at_672():
    image = tiled_image((672, 672), [[672, 672]], tile=336, side=24)
    assert int(image.is_visual.sum()) == 2880 and image.tokens == 2880 + 48
    assert image.grids == ((24, 24), (48, 48)) and image.grid is None
    newline = (image.kind == NEWLINE).nonzero().squeeze(1)
    assert (
        newline[0] == 576 + 48
        and int(image.frame[newline].min()) == 1
        and image.row[newline].tolist() == list(range(48))
    )


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
@pytest.mark.parametrize("policy", ["with-row", "always", "never"])
def test_newlines_go_as_the_policy_says(name, policy):
    model, make = family(name)
    batch = make(PROMPTS)
    with trio.Pipeline(model, stages=stages((1, 6), (3, 2)), newlines=policy) as pipeline, torch.no_grad():
        model(**batch)
    report = pipeline.report
    whole = tiled_image(size_of(1, TILE), PINPOINTS, tile=TILE, side=SIDE, most_tiles=2 if "one" in name else None)
    lines = int((~whole.is_visual).sum())
    sample = report.samples[0]
    assert sample.newlines == lines and sample.visual_tokens == whole.tokens - lines
    for stage in sample.stages:
        origins = stage.groups[0].origins
        rows = {row for frame, row in zip(origins.frame, origins.row, strict=True) if frame == 1}
        assert stage.newlines == {"with-row": len(rows), "always": lines, "never": 0}[policy]
        assert stage.kept == len(origins)
    text = report.layer_tokens[0][0] - whole.tokens
    assert report.layer_tokens[0][-1] == text + sample.stages[-1].kept + sample.stages[-1].newlines


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_a_newline_stands_where_the_model_puts_it(name):
    """The features at the places that we take for newlines are the model's newline embedding."""
    model, make = family(name)
    batch = make(PROMPTS[:2])
    seen = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    layout = trio.adapters.adapter_for(model).layout(batch["input_ids"], {"image": batch})
    for sample, images in enumerate(layout.images):
        columns = layout.visual[sample].nonzero().squeeze(1)
        is_newline = (seen["hidden"][sample, columns] == model.model.image_newline).all(-1)
        assert torch.equal(is_newline, torch.cat([~image.is_visual for image in images]))


# Videos


def onevision_video(frames: int):
    model, _ = family("llava-onevision")
    tokens = frames * 4 + 1  # each frame's 4 x 4 patches pooled to 2 x 2, one newline at the end
    ids = torch.tensor([[1, 5, *[VIDEO_TOKEN] * tokens, 7, 8, 9]])
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": noise(3, 1, frames, 3, TILE, TILE),
    }


def qwen_video(frames: int):
    model, _ = family("qwen2.5-vl")
    grid = torch.tensor([[frames // 2, 4, 8]])  # two frames make one step in time
    tokens = int(grid.prod()) // 4
    ids = torch.tensor([[1, 5, 96, *[VIDEO_TOKEN] * tokens, 97, 7, 8, 9]])
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": noise(3, int(grid.prod()), 3 * 2 * 16),
        "video_grid_thw": grid,
        "mm_token_type_ids": (ids == VIDEO_TOKEN).long() * 2,
    }


def qwen3_video(frames: int):
    """Timestamps stand between the frames; the encoder of videos calls that of images."""
    model, _ = family("qwen3-vl")
    grid = torch.tensor([[frames // 2, 4, 8]])
    config = model.config
    step = [5, config.vision_start_token_id, *[config.video_token_id] * 8, config.vision_end_token_id]
    ids = torch.tensor([[1, *step * (frames // 2), 7, 8, 9]])
    vision = config.vision_config
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": noise(3, int(grid.prod()), features),
        "video_grid_thw": grid,
        "mm_token_type_ids": (ids == config.video_token_id).long() * 2,
    }


@pytest.mark.parametrize(
    ("name", "make", "steps", "cells"),
    [("llava-onevision", onevision_video, 16, 4), ("qwen2.5-vl", qwen_video, 8, 8), ("qwen3-vl", qwen3_video, 8, 8)],
)
def test_a_video_of_16_frames(name, make, steps, cells, support):
    model, batch = make(16)
    with torch.no_grad():
        stock = model.generate(**batch, max_new_tokens=3, do_sample=False)
        with trio.Pipeline(model, stages=stages((0, "100%"))):
            assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), stock)
        with trio.Pipeline(model, stages=stages((1, "50%"), (3, "10%"))) as pipeline:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
    sample = pipeline.report.samples[0]
    assert sample.visual_tokens == steps * cells
    origins = sample.stages[0].groups[0].origins
    assert len(set(origins.frame)) > 1 and max(origins.frame) < steps
    places = list(zip(origins.frame, origins.row, origins.column, strict=True))
    assert places == sorted(places) and len(set(places)) == len(places) == steps * cells // 2
    support(name, "random", {"video": "yes"})


@pytest.mark.parametrize(("make", "steps", "cells"), [(onevision_video, 16, 4), (qwen_video, 8, 8)])
def test_a_compressor_takes_each_frame_of_a_video_alone(make, steps, cells):
    model, batch = make(16)
    zipper = {"name": "visionzip", "contextual": 1, "keep": {"count": 2, "per": "tile"}}
    with trio.Pipeline(model, compressor=zipper, stages=stages((1, "10%"))) as pipeline, torch.no_grad():
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    image = pipeline.report.samples[0].compressor.images[0]
    assert (image.tokens_in, image.kept) == (steps * cells, 2 * steps)
    assert [image.origins.frame.count(frame) for frame in range(steps)] == [2] * steps
    frame_of = [place // cells for place in range(steps * cells)]
    assert all(into < 0 or frame_of[place] == frame_of[into] for place, into in enumerate(image.merged))


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl", "internvl"])
def test_thumbnails_keep_all_alone_and_in_a_batch(name):
    """An image with fewer tokens than the count keeps them all, while a larger one beside it is reduced."""
    model, make = family(name)
    prompts = [Prompt("what is", 0, "this ?"), Prompt("and", 2, "that ?")]
    tokens = [len(image.row) for image in _images(model, make, prompts)]
    count = sorted(tokens)[0] + 1
    pipeline = trio.Pipeline(model, stages=stages((1, count)))
    with pipeline, torch.no_grad():
        together = model(**make(prompts)).logits[:, -1]
        samples = pipeline.report.samples
        for place, prompt in enumerate(prompts):
            alone = model(**make([prompt])).logits[0, -1]
            torch.testing.assert_close(together[place], alone, rtol=1e-4, atol=1e-4)
    assert [sample.stages[0].kept for sample in samples] == [min(count, t) for t in tokens]
    assert any("kept all" in note for sample in samples for g in sample.stages[0].groups for note in g.notes)


def _images(model, make, prompts):
    batch = make(prompts)
    layout = trio.adapters.adapter_for(model).layout(batch["input_ids"], {"image": batch})
    return [image.select(image.is_visual.nonzero().squeeze(1)) for sample in layout.images for image in sample]


class Noting(TopK):
    """Keeps the contexts that it is given, group by group: row, column and image; sizes; tiles; seeds."""

    seen: list[torch.Tensor]
    sizes: list[torch.Tensor]
    tiles: list[torch.Tensor]
    seeds: list[int]

    def select(self, ctx):
        origins = ctx.origins
        positions = torch.stack([origins.row, origins.column, origins.image.float()], -1)
        assert ctx.counts == tuple(ctx.valid.sum(1).tolist())
        self.seen.extend(row[there] for row, there in zip(positions, ctx.valid, strict=True))
        self.sizes.extend(row[there] for row, there in zip(ctx.sizes, ctx.valid, strict=True))
        self.tiles.extend(row[there] for row, there in zip(origins.tile, ctx.valid, strict=True))
        self.seeds.extend(ctx.seeds)
        return super().select(ctx)


def noting() -> Noting:
    return Noting(seen=[], sizes=[], tiles=[], seeds=[])


@pytest.mark.parametrize("per", ["image", "sample"])
@pytest.mark.parametrize("compressor", [None, {"name": "uniform-grid", "keep": "80%"}], ids=["alone", "compressor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_selectors_are_told_where_tokens_lie(name, compressor, per):
    """Behind a compressor and a stage, in a batch with several images: what is left, at its own places."""
    model, make = family(name)
    notes = noting()
    keeps = ({"share": "60%", "of": "current", "per": "image"}, {"share": "50%", "of": "current", "per": per})
    both = [
        trio.Stage(after_layer=after, keep=keep, selector=selector)
        for after, keep, selector in zip((0, 2), keeps, ("soft-nms", notes), strict=True)
    ]
    with trio.Pipeline(model, stages=both, compressor=compressor) as pipeline, torch.no_grad():
        model(**make(PROMPTS))
    expected = []
    for sample in pipeline.report.samples:
        for group, image in zip(sample.stages[0].groups, sample.images, strict=True) if sample.images else ():
            where = group.origins
            grids = [image.grids[min(frame, len(image.grids) - 1)] for frame in where.frame]
            rows = [
                ((row + 0.5) / height, (column + 0.5) / width, float(group.image))
                for row, column, (height, width) in zip(where.row, where.column, grids, strict=True)
            ]
            expected.append(torch.tensor(rows))
            if not image.placed:  # InternVL's tiles, and what the generic adapter knows nothing of
                expected[-1][:, :2] = float("nan")
    if per == "sample":
        expected = [expected[0], torch.cat(expected[1:])]
    assert len(notes.seen) == len(expected) == len(set(notes.seeds))
    for seen, wanted in zip(notes.seen, expected, strict=True):
        torch.testing.assert_close(seen, wanted, equal_nan=True)
        assert bool((((seen[:, :2] > 0) & (seen[:, :2] < 1)) | seen[:, :2].isnan()).all())
    known = all(image.placed for sample in pipeline.report.samples for image in sample.images)
    assert known == (name != "internvl" and pipeline.adapter_name != "generic")


@pytest.mark.parametrize("name", FAMILIES)
def test_selectors_are_told_what_a_compressor_merged_and_which_tile_a_token_comes_from(name):
    """Sizes against the report's merge map; the tiles of all tokens against the tower's inputs; seeds as alone."""
    model, make = family(name)
    notes = noting()
    stage = trio.Stage(after_layer=1, keep={"share": "50%", "of": "current"}, selector=notes)
    prompts = [prompt for prompt in PROMPTS if prompt.images][:2]
    with trio.Pipeline(model, stages=[stage], compressor={"name": "average-pool", "keep": "40%"}) as pipeline:
        model(**make(prompts))
        images = [image for sample in pipeline.report.samples for image in sample.compressor.images]
        alone = notes.seeds.copy()
        notes.seeds.clear()
        for prompt in prompts:
            model(**make([prompt]))
    assert notes.seeds == alone
    for image, sizes, tiles in zip(images, notes.sizes, notes.tiles, strict=False):
        assert sizes.tolist() == [image.merged.count(index) for index in image.indices] and sizes.max() > 1
        assert bool(tiles.isnan().all() if pipeline.adapter_name == "generic" else (tiles >= 0).all())
    tiled = {"llava-next", "llava-onevision", "internvl"}
    assert (name in tiled) == any(len(tiles.unique()) > 1 for tiles in notes.tiles if not tiles.isnan().any())


def test_positions_on_the_image():
    grid = ImageTokens.from_grid(2, 4, frames=2)
    middles = [[row, column] for _ in range(2) for row in (0.25, 0.75) for column in (0.125, 0.375, 0.625, 0.875)]
    assert grid.grid_positions.tolist() == middles  # a second frame shows the same positions
    tiled = ImageTokens.join([ImageTokens.from_grid(1, 1), ImageTokens.from_grid(2, 2)])
    assert tiled.grid_positions.tolist() == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    some = ImageTokens.from_grid(1, 1, leading_cls=True).with_newlines()
    for kind, known in ((PATCH, True), (CLS, False), (NEWLINE, False)):
        assert bool((some.grid_positions[some.kind == kind].isfinite() == known).all()) and bool(
            (some.kind == kind).any()
        )
    assert bool(dataclasses.replace(grid, placed=False).grid_positions.isnan().all())


# Qwen


def test_qwen_survivors_keep_their_own_positions():
    model, make = family("qwen2.5-vl")
    batch = make(PROMPTS[:1])
    seen = {}

    def note(name):
        def hook(module, args, kwargs):
            seen[name] = kwargs["position_embeddings"][0][0]

        return hook

    model.model.language_model.layers[0].register_forward_pre_hook(note("whole"), with_kwargs=True)
    with trio.Pipeline(model, stages=stages((2, 2))) as pipeline, torch.no_grad():
        # Registered behind the pipeline's hook, so that it sees what the layer gets.
        model.model.language_model.layers[2].register_forward_pre_hook(note("reduced"), with_kwargs=True)
        model(**batch)
    ids = batch["input_ids"][0]
    kept = pipeline.report.samples[0].stages[0].groups[0].indices
    visual = (ids == IMAGE_TOKEN).nonzero().squeeze(1)[kept]
    columns = torch.cat([(ids != IMAGE_TOKEN).nonzero().squeeze(1), visual]).sort().values
    assert torch.equal(seen["reduced"], seen["whole"][columns])


def test_qwen_refuses_to_renumber():
    with pytest.raises(trio.UnsupportedModelError, match="rows and columns; use original"):
        trio.Pipeline(family("qwen2.5-vl")[0], stages=stages((1, 2)), positions="compact")


def test_deepstack_features_reach_the_survivors_only():
    """Against a pass in which the features of dropped tokens make no difference."""
    model, make = family("qwen3-vl")
    batch = make(PROMPTS[:1])
    with torch.no_grad():
        stock = model(**batch).logits
        with trio.Pipeline(model, stages=stages((0, 3))) as pipeline:
            few = model(**batch).logits
            again = pipeline.report
        without = family("qwen3-vl")[0]
        without.model.visual.deepstack_visual_indexes = []
        without.model.visual.deepstack_merger_list = torch.nn.ModuleList()
        with trio.Pipeline(without, stages=stages((0, 3))).replay(again):
            plain = without(**batch).logits
    assert not torch.allclose(few[0, -1], stock[0, -1], atol=1e-3)
    assert not torch.allclose(few[0, -1], plain[0, -1], atol=1e-3)  # the features are really added


def test_deepstack_to_the_last_layer_is_refused():
    model, make = family("qwen3-vl")
    model.model.language_model.layers = model.model.language_model.layers[:3]
    model.config.text_config.num_hidden_layers = 3
    with (
        trio.Pipeline(model, stages=stages((0, 3))),
        torch.no_grad(),
        pytest.raises(trio.UnsupportedModelError, match=r"DeepStack.*3 layers of 3"),
    ):
        model(**make(PROMPTS[:1]))


# The generic adapter


def gemma3():
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={
                **{k: v for k, v in text_config("llama").to_dict().items() if k in GEMMA},
                "head_dim": 8,
                "sliding_window": 8,
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            mm_tokens_per_image=4,
        )
    )


def paligemma():
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            text_config={
                "model_type": "gemma",
                **{k: v for k, v in text_config("llama").to_dict().items() if k in GEMMA},
                "head_dim": 8,
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            projection_dim=32,
        )
    )


GEMMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (gemma3, r"Gemma3ForConditionalGeneration.*token types.*other kinds than full attention.*add-an-adapter"),
        (paligemma, r"PaliGemmaForConditionalGeneration.*token types.*add-an-adapter"),
    ],
)
def test_models_that_the_generic_adapter_cannot_serve(make, reason):
    with pytest.raises(trio.UnsupportedModelError, match=reason):
        trio.Pipeline.from_spec("trio-11", make())


def test_features_encoded_without_the_pipeline_are_refused():
    model, make = family("llava-next")
    batch = make(PROMPTS[:1])
    adapter = trio.adapters.adapter_for(model)
    with pytest.raises(trio.InputError, match=r"image_sizes.*pass pixels"):
        adapter.layout(batch["input_ids"], {})


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl", "internvl"])
def test_a_prompt_cut_within_an_image(name):
    model, make = family(name)
    batch = make(PROMPTS[:1])
    first = int((batch["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    cut = batch["input_ids"][:, first + 1 :]
    with pytest.raises(trio.InputError, match="cut within an image"):
        trio.adapters.adapter_for(model).layout(cut, {"image": batch})
