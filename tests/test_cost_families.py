"""Shapes of every family, from configurations alone, against the operators and caches of tiny stock models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES, IMAGE_TOKEN, PATCH, TILE, family
from support.models import text_config
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from trio.adapters import families
from trio.cli import app
from trio.core.prompts import Prompt
from trio.core.upstream import cache_of
from trio.cost import CostPrediction, predict, shape_of

#: What every part is counted from: the tower's widths differ from the decoder's, so that none can be taken for another.
WIDTH, INNER, HEADS = 48, 40, 4
NOTHING = {"version": 1, "stages": [{"after_layer": 0, "keep": "100%", "scorer": "random", "selector": "top-k"}]}
#: Images in tiles without padding: the whole image, and two tiles of it; one newline behind each row (or the grid).
TILED = ("llava-next", "llava-onevision")


def config_of(name: str) -> Any:
    """The configuration of a tiny model of a family."""
    if name != "idefics3":
        return family(name)[0].config
    vision = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": TILE, "patch_size": PATCH // 2}
    return transformers.Idefics3Config(
        text_config=text_config("llama"),
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )


def stock(name: str) -> Any:
    """A tiny model of a family under eager attention, which is made of operators that are counted."""
    config = config_of(name)
    vision = config.vision_config
    for key, value in (
        ("embed_dim", WIDTH),
        ("hidden_size", WIDTH),
        ("intermediate_size", INNER),
        ("head_dim", WIDTH // HEADS),
    ):
        if key == "hidden_size" and hasattr(vision, "embed_dim"):
            continue  # Qwen2-VL gives that name to what the language model gets
        if hasattr(vision, key):
            setattr(vision, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.set_attn_implementation("eager")
    return model


def prompt(name: str, model: Any) -> dict[str, torch.Tensor]:
    """An image and some text."""
    if name not in TILED:
        inputs = families()[model.config.model_type].tiny_inputs(model.config)
        made = dict(inputs([Prompt(0, "what is in this image ?")]))
        if name == "mistral3":  # a processor pads to the largest image of the batch, the tiny inputs to a fixed size
            (height, width) = made["image_sizes"][0].tolist()
            made["pixel_values"] = made["pixel_values"][..., :height, :width]
        return made
    side = TILE // PATCH
    return {
        "input_ids": torch.tensor([[IMAGE_TOKEN] * (side**2 + 2 * side**2 + side) + [5, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 3, TILE, TILE),
        "image_sizes": torch.tensor([[TILE, 2 * TILE]]),
    }


def predicted(name: str, model: Any, ids: torch.Tensor) -> CostPrediction:
    placeholders = int((ids == IMAGE_TOKEN).sum())
    visual = placeholders - (TILE // PATCH if name in TILED else 0)
    shape = shape_of(model.config, dtype_bytes=4)
    return predict(NOTHING, shape, images=(visual,), text_tokens=ids.shape[1] - visual)


@pytest.mark.parametrize("name", [*FAMILIES, "idefics3"])
@torch.no_grad()
def test_a_family_costs_what_its_configuration_says(name: str) -> None:
    model = stock(name)
    inputs = prompt(name, model)
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs, logits_to_keep=1, use_cache=True)
    counts = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    rotary = sum(count for module, count in counts.items() if module.endswith(("rotary_emb", "rotary_pos_emb")))
    made = predicted(name, model, inputs["input_ids"])
    assert counter.get_total_flops() - rotary == made.full.flops.total
    assert made.full.flops.tower and made.full.flops.projector and not made.notes
    layers = cache_of(out).layers
    assert (
        sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)) == made.full.kv_bytes
    )


@pytest.mark.parametrize("name", [*FAMILIES, "idefics3"])
def test_a_shape_needs_no_model(name: str) -> None:
    """What a hub's configuration file gives is enough."""
    config = config_of(name)
    again = type(config).from_dict(config.to_dict())
    assert shape_of(again) == shape_of(config)
    assert shape_of(again).name == config.model_type


@pytest.mark.parametrize("name", [*FAMILIES, "idefics3"])
def test_show_reads_a_folder_with_a_configuration(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["show", "trio-soft-11", "--model", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.stderr
    cost = json.loads(result.stdout)["cost"]
    assert cost["full"]["flops"]["tower"] > 0 and cost["full"]["kv_bytes"] > cost["compressed"]["kv_bytes"] > 0
