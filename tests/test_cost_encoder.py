"""What a compressor costs, by hand."""

from __future__ import annotations

import pytest

import trio
from trio.core.part import Part
from trio.cost import predict, published_shape
from trio.cost.encoder import reading_flops
from trio.encoders.compressors.vispruner import VisPruner

LLAVA = published_shape("llava-1.5-7b")
QWEN = published_shape("qwen2.5-vl-7b")


def made(compressor, shape=LLAVA, images=(576,), **more):
    return predict({"version": 1, "compressor": compressor}, shape, images=images, **more)


def test_scan_by_hand():
    """Two rows of the class token over 577 tokens of width 1024, and 576 x 96 similarities of width 4096."""
    cost = made({"name": "scan", "keep": 96})
    assert cost.compressed.flops.compression == 2 * 2 * 577 * 1024 + 2 * 576 * 96 * 4096
    assert cost.full.flops.compression == 0
    assert cost.compressed.visual_by_layer == [96] * 32


def test_visionzip_by_hand():
    """108 dominant, 20 contextual: 468 keys against 20, 21 rows through the projector again."""
    cost = made({"name": "visionzip", "keep": 128})
    projected = 2 * 21 * (1024 * 4096 + 4096 * 4096)
    assert cost.compressed.flops.compression == 2 * 577 * 1024 + 2 * 468 * 20 * 1024 + projected


def test_attention_received_is_counted_by_pairs():
    tower = QWEN.tower
    scan = trio.COMPRESSORS.build({"name": "scan", "window": 4, "limit": "ceil", "local_layer": 0, "global_layer": -1})
    assert reading_flops(tower, 1024, scan.reads()) == 2 * 2 * 4096 * 4096 * tower.hidden


def test_an_image_that_keeps_all_costs_nothing():
    assert made({"name": "scan", "keep": 576}).compressed.flops.compression == 0
    one = made({"name": "random", "keep": 64})
    assert one.compressed.flops.compression == 0 and not one.notes


def test_what_is_not_known_is_noted(monkeypatch):
    monkeypatch.setattr(VisPruner, "flops", Part.flops)
    cost = made({"name": "vispruner", "keep": 64})
    assert cost.compressed.flops.compression == 2 * 577 * 1024
    assert any("'vispruner'" in note for note in cost.notes)


def test_counts_that_depend_on_the_image():
    for compressor in ("prumerge", {"name": "random", "keep": {"count": 64, "per": "tile"}}):
        with pytest.raises(trio.InputError, match="give `compressed`"):
            made(compressor)
        assert made(compressor, compressed=[80]).compressed.visual_by_layer == [80] * 32
    share = made({"name": "random", "keep": {"share": "11.111%", "per": "tile"}}, images=(2880,))
    assert share.compressed.visual_by_layer == [320] * 32
