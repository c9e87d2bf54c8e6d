"""All promises on a model of every family."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, IMAGE_TOKEN, family
from support.features import features_of

import trio
from trio.core.upstream import Role, cache_of, keywords
from trio.testing import Prompt, check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:no adapter knows")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_promises(name, support):
    model, inputs = family(name)
    results = check_adapter(model, inputs)
    assert len(results) > 50
    support(name, "random", features_of(results))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision(name):
    model, inputs = family(name, dtype=torch.bfloat16)
    check_adapter(model, inputs, promises=["identity", "reversibility", "decode"])


@pytest.mark.parametrize("compressor", [None, {"name": "visionzip", "keep": "80%"}], ids=["alone", "compressor"])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_second_turn_with_a_new_image_by_hand(name, compressor, support):
    """Qwen's `generate` cannot take an image in a later turn; a forward with positions of the user's own can."""
    model, make = family(name)
    first, second = make([Prompt("what is", 1, "in here ?")]), make([Prompt("and", 2, "this one then ?")])
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "mm_token_type_ids": torch.cat([first["mm_token_type_ids"], second["mm_token_type_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "image_grid_thw": torch.cat([first["image_grid_thw"], second["image_grid_thw"]]),
    }
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    positions, _ = model.model.get_rope_index(
        whole["input_ids"], mm_token_type_ids=whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"]
    )
    cut = first["input_ids"].shape[1]
    stages = [trio.Stage(after_layer=0, keep="60%"), trio.Stage(after_layer=2, keep="30%")]
    with trio.Pipeline(model, stages=stages, compressor=compressor) as pipeline, torch.no_grad():
        cache = cache_of(model(**first, position_ids=positions[..., :cut]))
        later = {**second, "attention_mask": whole["attention_mask"], "position_ids": positions[..., cut:]}
        logits = model(**later, **keywords({Role.CACHE: cache})).logits
        turns = [report.selection() for report in pipeline.reports]
    both = [[[*one[0], *two[0]]] for one, two in zip(*turns, strict=True)]
    assert all(len(images) == 2 for stage in both for images in stage)
    with pipeline.replay(both), torch.no_grad():
        expected = model(**whole, position_ids=positions).logits
    assert int((second["input_ids"] == IMAGE_TOKEN).sum()) > len(both[1][0][1])  # something was dropped
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=1e-4, atol=1e-4)
    support(name, "random", {"new image in a later turn": "by hand"})
