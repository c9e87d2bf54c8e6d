"""Towers of open_clip and timm: signals against the libraries' own attention weights, no trace, wrapped models."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from support.library_towers import MODELS, SIDE, pixels, whole_attention

from trio.core.tokens import Signal
from trio.encoders.reading.reader import Reader, Reading
from trio.encoders.towers import tower_for
from trio.errors import UnsupportedModelError

NAMES = list(MODELS)


def wanted(tower: Any) -> list[Signal]:
    kinds = ["attention", "keys", "hidden", *(["cls"] if tower.has_cls else [])]
    return [Signal(kind, layer) for kind in kinds for layer in (0, -2, -1)]


def read(model: Any, images: torch.Tensor) -> Reading:
    tower = tower_for(model)
    with Reader(tower, wanted(tower)) as reader, torch.no_grad():
        tower.run(images)
        return reader.take()


def naive_keys(block: Any, entering: torch.Tensor) -> torch.Tensor:
    """Keys ``(B, S, heads, head_dim)`` from the weights."""
    attention = block.attn
    if hasattr(attention, "qkv"):
        keys = attention.qkv(block.norm1(entering)).chunk(3, dim=-1)[1]
        return attention.k_norm(keys.unflatten(-1, (attention.num_heads, -1)))
    keys = F.linear(block.ln_1(entering), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)[1]
    return getattr(attention, "ln_k", torch.nn.Identity())(keys.unflatten(-1, (attention.num_heads, -1)))


@pytest.mark.parametrize("name", NAMES)
def test_signals_are_those_of_the_whole_attention(name: str):
    images = pixels(0)
    matrices, hidden = whole_attention(MODELS[name](), images)
    model = MODELS[name]()
    tower, reading = tower_for(model), read(model, images)
    assert reading.inputs == tuple(rows * columns for rows, columns in tower.grids(images))
    assert len(matrices) == len(tower.blocks)
    for signal, value in reading.values.items():
        weights, rows = matrices[signal.layer], hidden[signal.layer]
        if signal.kind == "attention":
            received = weights.mean(1)[:, 0] if tower.has_cls else weights.mean((1, 2))
            expected = received[:, tower.prefix :].flatten()
        elif signal.kind == "keys":
            if signal.layer == 0:
                continue  # what enters the first block is not recorded
            with torch.no_grad():
                keys = naive_keys(tower.blocks[signal.layer], hidden[signal.layer - 1])
            expected = keys[:, tower.prefix :].flatten(0, 1)
        else:
            expected = rows[:, 0] if signal.kind == "cls" else rows[:, tower.prefix :].flatten(0, 1)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=lambda m, s=signal: f"{s}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_hooks_leave_no_trace_and_a_batch_reads_as_its_images(name: str):
    model, images = MODELS[name](), pixels(3)
    tower = tower_for(model)

    def state() -> list[Any]:
        return [
            (path, sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
            for path, part in model.named_modules()
        ]

    def output() -> torch.Tensor:
        with torch.no_grad():
            given = model.visual(images) if hasattr(model, "visual") else model(images)
        return given[0] if isinstance(given, tuple) else given

    before, clean = output(), state()
    with Reader(tower, wanted(tower)):
        assert torch.equal(output(), before)
    assert torch.equal(output(), before) and state() == clean
    together = read(model, images)
    singles = [read(model, image[None]) for image in images]
    for signal, value in together.values.items():
        alone = torch.cat([single.values[signal] for single in singles])
        torch.testing.assert_close(value, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["open_clip", "timm", "timm registers, no class token"])
def test_half_precision_and_other_sizes(name: str):
    model = MODELS[name]().to(torch.bfloat16)
    tower = tower_for(model)
    side = SIDE + 8 if name == "timm" else SIDE  # timm's test_vit takes any size
    images = pixels(1, side=side).to(torch.bfloat16)
    reading = read(model, images)
    assert tower.grids(images) == [(side // 4, side // 4)] * 2 and reading.inputs == ((side // 4) ** 2,) * 2
    for signal, value in reading.values.items():
        assert value.dtype == (torch.float32 if signal.kind in ("attention", "keys") else torch.bfloat16)
        assert bool(value.isfinite().all())


def test_other_ways_to_call_the_tower_are_read_too():
    images = pixels(2)
    visual, vit = MODELS["open_clip"]().visual, MODELS["timm"]()
    for module, call in ((visual, visual.forward_intermediates), (vit, vit.forward_features), (vit, vit)):
        expected = read(module, images)
        tower = tower_for(module)
        with Reader(tower, wanted(tower)) as reader, torch.inference_mode():
            call(images)
            found = reader.take()
        assert all(torch.equal(found.values[signal], expected.values[signal]) for signal in expected.values)


def test_towers_that_are_not_known_are_refused_with_reasons():
    resnet = open_clip.model.ModifiedResNet([1, 1, 1, 1], 16, 2, image_size=32, width=8)
    with pytest.raises(UnsupportedModelError, match=r"nothing registered takes a ModifiedResNet.*open-clip"):
        tower_for(resnet)
    with pytest.raises(UnsupportedModelError, match="nothing registered takes a Eva"):
        tower_for(timm.create_model("eva02_tiny_patch14_224", depth=1))
    scaled = open_clip.transformer.VisionTransformer(8, 4, 16, 1, 2, 2.0, scaled_cosine_attn=True)
    with pytest.raises(UnsupportedModelError, match="scaled cosine"):
        tower_for(scaled)
    parallel = timm.create_model("test_vit", block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(UnsupportedModelError, match="not built as those known"):
        tower_for(parallel)
