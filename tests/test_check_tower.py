"""`check_tower` passes every tower, and finds what is wrong with wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.library_towers import MODELS, pixels
from support.towers import TOWERS

import trio
from trio.encoders.towers.base import Heads, Layout
from trio.encoders.towers.clip import ClipTower
from trio.encoders.towers.qwen_vl import QwenTower
from trio.testing import check_tower


def images(name: str) -> Any:
    given = TOWERS[name].images(0)
    if TOWERS[name].packed:
        return {"pixel_values": given["hidden_states"], "grid_thw": given["grid_thw"]}
    return given


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers(name: str, implementation: str):
    results = check_tower(TOWERS[name].make(implementation), images(name))
    assert results.passed and len(results) >= 8


@pytest.mark.parametrize("name", [name for name in MODELS if name.split()[-1] != "timm"])
def test_towers_of_libraries(name: str):
    results = check_tower(MODELS[name](), pixels(0))
    assert results.passed and len(results) >= 10


class Unregistered(ClipTower):
    pass


class WrongScale(ClipTower):
    def listen(self, block, told):
        return super().listen(block, lambda h: told(Heads(h.queries, h.keys, h.plain_keys, h.scale * 1.1)))


class ClassTokenAmongPatches(ClipTower):
    prefix = 0


class WrongGrid(ClipTower):
    def grids(self, images):
        return [(4, 6)] * 3


class MergesElsewhere(ClipTower):
    merge_paths = ("layer_norm1", "mlp")


class NoBias(ClipTower):
    def bias_attention(self, block, bias):
        return []


class LeavesAHook(ClipTower):
    def listen(self, block, told):
        self.module.register_forward_hook(lambda *_: None)
        return super().listen(block, told)


class Unturned(QwenTower):
    def listen(self, block, told):
        def plain(h):
            width = h.plain_keys.shape[-1]
            told(Heads(h.queries, h.plain_keys, h.plain_keys, width**-0.5))

        return super().listen(block, plain)


class OneSpan(QwenTower):
    def listen_layout(self, told):
        return super().listen_layout(lambda layout: told(Layout(((0, layout.spans[-1][1]),), 0, layout.order)))


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        (Unregistered, "found again"),
        (WrongScale, "attention of block 0: attention differs"),
        (ClassTokenAmongPatches, "grids"),
        (WrongGrid, "grids"),
        (MergesElsewhere, "merged"),
        (NoBias, "attention counts merged tokens"),
        (LeavesAHook, "hooks or attributes are left"),
        (Unturned, "attention of block 3: attention differs"),
        (OneSpan, "4 matrices for 1 inputs"),
    ],
)
def test_wrong_towers_are_found_out(wrong: type[trio.Tower], finding: str):
    name = "qwen2.5-vl" if issubclass(wrong, QwenTower) else "clip"
    tower = wrong(TOWERS[name].make("sdpa"))
    with pytest.raises(AssertionError, match="do not hold") as caught:
        check_tower(tower, images(name))
    assert finding in str(caught.value)
    assert not check_tower(tower, images(name), raise_on_failure=False).passed


def test_modules_without_a_tower_are_refused():
    with pytest.raises(trio.UnsupportedModelError, match="nothing registered"):
        check_tower(torch.nn.Linear(2, 2), torch.randn(2, 3, 8, 8))
