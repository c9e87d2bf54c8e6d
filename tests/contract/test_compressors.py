"""Compressors in the runtime: every promise on every family, and logits against inputs put together by hand."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, IMAGE_TOKEN, family
from support.features import features_of

import trio
from trio.testing import Prompt, check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:no adapter knows")

READS_TOWER = ["llava", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"]
GENERIC = [name for name in FAMILIES if name not in READS_TOWER]
QUESTION = [Prompt("what is in the picture", 1, "here ?")]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_promises_with_a_compressor(name, support):
    model, inputs = family(name)
    results = check_adapter(model, inputs, compressor="average-pool" if name in GENERIC else "visionzip")
    assert len(results) > 50
    found = features_of(results)
    support(name, "random", {"compressor": found["batch"]})


@pytest.mark.parametrize("name", GENERIC)
def test_a_tower_that_cannot_be_read_is_refused_with_what_fits(name):
    model, _ = family(name)
    with pytest.raises(trio.UnsupportedModelError, match=r"'visionzip' reads attention, keys .* average-pool"):
        trio.Pipeline(model, compressor={"name": "visionzip", "keep": 4})


def run(model, inputs, compressor, **more):
    pipeline = trio.Pipeline(model, compressor=compressor, **more)
    with pipeline, torch.no_grad():
        logits = model(**inputs).logits
    return logits, pipeline.report


def tower_features(model, pixels):
    """What the tower of a LLaVA model gives, class token first, and its attention matrices, eager and in full."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    tower.set_attn_implementation(before)
    return out.hidden_states[-2], out.attentions[-2].mean(1)


@pytest.mark.parametrize("class_token", [True, False])
def test_visionzip_equals_embeddings_put_together_by_hand(class_token):
    """LLaVA: text, the class token, dominant and contextual tokens merged before the projector, text."""
    model, make = family("llava")
    inputs = make(QUESTION)
    zipper = {"name": "visionzip", "keep": 8, "contextual": 3, "class_token": class_token}
    logits, report = run(model, inputs, zipper, positions="compact")

    hidden, attention = tower_features(model, inputs["pixel_values"])
    compressed = report.samples[0].compressor.images[0]
    assert (compressed.tokens_in, compressed.asked, compressed.kept) == (16, 8, 8)
    kinds = compressed.origins.kind
    assert kinds.count("cls") == class_token and kinds.count("merged") <= 3
    best = attention[0, 0, 1:].argsort(descending=True)[: 5 - class_token].sort().values
    rest = [i for i in range(16) if i not in best.tolist()]
    step = max(1, len(rest) // 3)
    targets = rest[::step][:3]
    captured = []
    projections = [m for n, m in model.model.vision_tower.named_modules() if n.endswith("k_proj")]
    handle = projections[-2].register_forward_hook(lambda module, args, out: captured.append(out))
    with torch.no_grad():
        model.model.vision_tower(inputs["pixel_values"])
    handle.remove()
    heads = model.config.vision_config.num_attention_heads
    keys = captured[0][0, 1:].unflatten(-1, (heads, -1)).mean(1)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    rows = {int(i): hidden[0, 1 + i] for i in best}
    for number, target in enumerate(targets):
        members = [i for i in rest if i not in targets and int((keys[targets] @ keys[i]).argmax()) == number]
        extra = torch.stack([hidden[0, 1 + i] for i in members]).mean(0) if members else 0
        rows[target] = hidden[0, 1 + target] + extra
    ordered = ([hidden[0, 0]] if class_token else []) + [rows[i] for i in sorted(rows)]
    with torch.no_grad():
        visual = model.model.multi_modal_projector(torch.stack(ordered))
        expected = by_hand(model, inputs["input_ids"], visual)
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=1e-4, atol=1e-4)


def by_hand(model, ids, visual, **more):
    """Logits of the language model on text with these visual tokens in place of the placeholders."""
    where = (ids[0] == IMAGE_TOKEN).nonzero().squeeze(1)
    text = model.get_input_embeddings()(ids)
    embeds = torch.cat([text[:, : where[0]], visual[None], text[:, where[-1] + 1 :]], 1)
    return model.lm_head(model.model.language_model(inputs_embeds=embeds, **more).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        *((name, "original") for name in ("llava", "qwen2-vl", "qwen2.5-vl", "internvl")),
        ("llava", "compact"),
        ("internvl", "compact"),
    ],
)
def test_merged_features_stand_where_they_should(name, positions):
    """A mean of all of an image's tokens, at the middle one: the language model sees it at that token's position."""
    model, make = family(name)
    inputs = make([Prompt("what is", 0, "here ?")])
    logits, report = run(model, inputs, {"name": Middle(), "keep": 1}, positions=positions)
    ids = inputs["input_ids"]
    places = (ids[0] == IMAGE_TOKEN).nonzero().squeeze(1)
    middle = len(places) // 2
    assert report.samples[0].compressor.images[0].indices == [middle]
    assert report.samples[0].compressor.images[0].merged == [middle] * len(places)
    held = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: held.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    embeds, columns = held["inputs_embeds"], held.get("position_ids")
    columns = torch.arange(ids.shape[1])[None] if columns is None else columns
    keep = [c for c in range(ids.shape[1]) if c not in places.tolist() or c == int(places[middle])]
    merged = embeds.clone()
    merged[0, places[middle]] = embeds[0, places].mean(0)
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=merged[:, keep],
            position_ids=columns[..., keep] if positions == "original" else None,
            attention_mask=torch.ones(1, len(keep), dtype=torch.long),  # else gaps would read as packed sequences
            use_cache=False,
        ).last_hidden_state
        expected = model.lm_head(hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


class Middle(trio.Compressor):
    """The mean of all tokens, as they enter the language model, in the place of the middle one."""

    space = "language"

    def compress(self, tokens, k):
        from dataclasses import replace

        middle = tokens.tokens // 2
        origins = tokens.origins.select(torch.tensor([middle]))
        return replace(
            tokens,
            features=tokens.features.mean(0, keepdim=True),
            origins=replace(origins, kind=torch.tensor([2]), size=torch.tensor([tokens.tokens])),
            sizes=tokens.sizes.sum()[None],
            token_index=torch.tensor([middle]),
            merge_map=torch.zeros_like(tokens.merge_map),
        )


def test_random_is_the_same_in_any_batch_and_at_every_step():
    model, make = family("llava")
    prompts = [Prompt("what is", 1, "here ?"), Prompt("and in this", 2, "or that", 3, "?")]
    spec = {"name": "random", "keep": 5}
    _, together = run(model, make(prompts), spec)
    for sample, prompt in enumerate(prompts):
        _, alone = run(model, make([prompt]), spec)
        assert alone.samples[0].compressor == together.samples[sample].compressor
    both = together.samples[1].compressor.images
    assert both[0].indices != both[1].indices
    pipeline = trio.Pipeline(model, compressor=spec)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    with pipeline:
        cached = model.generate(**make(prompts), **settings)
        uncached = model.generate(**make(prompts), use_cache=False, **settings)
    assert torch.equal(cached, uncached)


def kept(report, sample=0):
    return [image.kept for image in report.samples[sample].compressor.images]


def test_numbers_per_tile_image_and_sample():
    """Two images of LLaVA-NeXT, the first one with tiles that padding covers in part."""
    model, make = family("llava-next")
    inputs = make([Prompt("what is", 1, "and", 3, "here ?")])
    _, full = run(model, inputs, {"name": "random", "keep": 1})
    first, second = (image.tokens_in for image in full.samples[0].compressor.images)
    assert kept(full) == [1, 1]
    _, tiles = run(model, inputs, {"name": "random", "keep": {"count": 3, "per": "tile"}})
    assert kept(tiles) == [15, 15]  # the whole image and 2 x 2 tiles each
    assert set(tiles_of(tiles.samples[0].compressor.images[1]).values()) == {3}  # the first one's rows are cropped
    _, share = run(model, inputs, {"name": "random", "keep": {"share": "25%", "per": "sample"}})
    assert sum(kept(share)) == round((first + second) / 4)
    _, most = run(model, inputs, {"name": "random", "keep": {"count": 10, "per": "sample"}})
    assert sum(kept(most)) == 10 and abs(kept(most)[0] - 10 * first / (first + second)) < 1


def tiles_of(image):
    """How many tokens each tile of the tiny model (4 x 4 patches a tile) has left."""
    counts = {}
    for frame, row, column in zip(image.origins.frame, image.origins.row, image.origins.column, strict=True):
        tile = (frame, row // 4, column // 4) if frame else (0, 0, 0)
        counts[tile] = counts.get(tile, 0) + 1
    return counts


def test_a_split_by_saliency_gives_tiles_what_the_whole_image_looks_at():
    model, make = family("llava-next")
    inputs = make([Prompt("what is", 3, "here ?")])  # a square: the whole image and 2 x 2 tiles
    spec = {"name": "visionzip", "class_token": False, "keep": 24}
    _, even = run(model, inputs, spec)
    _, looked = run(model, inputs, {**spec, "split": "saliency"})
    assert kept(even) == kept(looked) == [24]
    even_tiles, tiles = (tiles_of(report.samples[0].compressor.images[0]) for report in (even, looked))
    assert even_tiles[0, 0, 0] == tiles[0, 0, 0] and sum(tiles.values()) == 24
    _, attention = tower_features(model, inputs["pixel_values"][0, :1])
    at = attention[0, 0, 1:].view(4, 4)
    mass = {(1, r, c): float(at[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum()) for r in (0, 1) for c in (0, 1)}
    best, least = max(mass, key=mass.__getitem__), min(mass, key=mass.__getitem__)
    assert tiles.get(best, 0) > tiles.get(least, 0)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        ({"name": "visionzip"}, "keep: missing"),
        ({"name": "visionzip", "keep": 4, "layer": 7}, "block 7"),
        ({"name": "visionzip", "keep": 4, "split": "saliency"}, "whole image beside its tiles"),
        ({"name": "visionzip", "keep": {"count": 4, "per": "tile"}, "split": "saliency"}, "no number to split"),
        ({"name": "prumerge", "keep": 4}, "decides its own count"),
        ({"name": "visionzip", "keep": 20, "if_fewer": "error"}, "20 tokens are to be kept, but only 16"),
    ],
)
def test_what_cannot_work_is_refused(compressor, message):
    model, make = family("llava")
    with pytest.raises(trio.TrioError, match=message):
        run(model, make(QUESTION), compressor)


def test_features_computed_elsewhere_are_refused():
    """Signals come from the tower at work; features from before the pipeline was attached have none."""
    model, make = family("llava")
    inputs = make(QUESTION)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    given = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}}
    with trio.Pipeline(model, compressor={"name": "visionzip", "keep": 4}), torch.no_grad():
        with pytest.raises(trio.InputError, match="pass pixels"):
            model(**given)
        model(**inputs)  # and the model works as before


def test_a_method_that_decides_its_own_count():
    model, make = family("llava")
    _, report = run(model, make([Prompt("what is", 1, "or", 2, "here ?")]), "prumerge")
    for image in report.samples[0].compressor.images:
        assert image.asked is None and 1 <= image.kept <= 16
    assert report.samples[0].visual_by_layer(1) == [sum(kept(report))]


@pytest.mark.parametrize(
    "name", ["visionzip", "scan", "prumerge", "vispruner", "divprune", "uniform-grid", "average-pool"]
)
def test_every_method_on_llava(name):
    model, make = family("llava")
    prompts = [Prompt("what is", 1, "here ?"), Prompt("and in", 2, "or", 3, "?"), Prompt("no picture at all")]
    spec = {"name": name} if name == "prumerge" else {"name": name, "keep": "40%"}
    if name == "scan":
        spec |= {"local_layer": 1, "window": 2}
    batch, report = run(model, make(prompts), spec)
    for sample, prompt in enumerate(prompts):
        alone, one = run(model, make([prompt]), spec) if prompt.images else (None, None)
        if one is not None:
            assert one.samples[0].compressor == report.samples[sample].compressor
            torch.testing.assert_close(batch[sample, -1], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_a_class_token_pushes_its_neighbours_along():
    """Where the first tokens are kept, the class token still comes first and the report says what stands where."""
    model, make = family("llava")
    inputs = make(QUESTION)
    _, report = run(model, inputs, {"name": "visionzip", "keep": 15, "contextual": 0})
    image = report.samples[0].compressor.images[0]
    assert image.origins.kind == ["cls"] + ["patch"] * 14
    assert image.indices[0] == 0 and len(set(image.indices)) == 15
    rows, columns = image.origins.row[1:], image.origins.column[1:]
    places = [4 * row + column for row, column in zip(rows, columns, strict=True)]
    assert places == sorted(set(places))
