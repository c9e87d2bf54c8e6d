"""Canvases of many sizes, and views that show what the stock image processors show."""

from __future__ import annotations

import numpy as np
import pytest

from lab.training.next import NEXT, Views, image_settings, tile_grid
from lab.training.qwen import LEAST, MOST, QWEN_VL, MergedPatches, SizedBranches
from lab.training.tower import IGNORE, normalised, pixels
from lab.training.vocabulary import build_tokenizer
from trio.measure.shapesvqa.views import LARGEST, canvas_of, tile, varied_scene, view, whole


def test_sizes_and_aspect_ratios_vary() -> None:
    sizes = [canvas_of("train", 0, i).size for i in range(300)]
    ratios = [width / height for width, height in sizes]
    assert len(set(sizes)) > 250 and max(map(max, sizes)) <= LARGEST and min(map(min, sizes)) >= 90
    assert min(ratios) < 0.5 and max(ratios) > 2 and sum(0.8 < r < 1.25 for r in ratios) > 30
    assert sizes[7] == canvas_of("train", 0, 7).size != canvas_of("train", 1, 7).size


def test_things_on_a_canvas_do_not_overlap() -> None:
    for index in range(60):
        scene = varied_scene("validation", 0, index)
        boxes = [item.box for item in scene.items]
        assert len(boxes) >= 6
        for i, (a0, a1, a2, a3) in enumerate(boxes):
            for b0, b1, b2, b3 in boxes[:i]:
                assert min(a2, b2) - max(a0, b0) <= 2 or min(a3, b3) - max(a1, b1) <= 2


@pytest.mark.parametrize("index", range(6))
def test_views_are_what_the_processor_cuts(index: int) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    scene = varied_scene("test", 0, index)
    cut = LlavaNextImageProcessorPil(**image_settings(NEXT))(scene.image, return_tensors="pt")["pixel_values"][0]
    rows, cols = tile_grid(NEXT, scene)
    ours = [whole(scene, NEXT.size)]
    ours += [tile(scene, NEXT.size[0], (rows, cols), row, col) for row in range(rows) for col in range(cols)]
    assert len(cut) == len(ours)
    for theirs, mine in zip(cut, ours, strict=True):
        assert (theirs - normalised(pixels(mine))).abs().mean() < 0.1  # of a range from -2 to 2


def test_a_view_moves_things_and_forgets_what_it_does_not_show() -> None:
    scene = varied_scene("test", 0, 3)
    width, height = scene.image.size
    same = view(scene, (0, 0, width, height), (width, height))
    assert same.items == scene.items and np.array_equal(same.item_map, scene.item_map)
    item = scene.items[0]
    left, top, right, bottom = item.box
    near = view(scene, item.box, (2 * (right - left), 2 * (bottom - top)))
    assert [i.shape for i in near.items][:1] == [item.shape]
    assert near.items[0].box == (0, 0, 2 * (right - left), 2 * (bottom - top))
    assert near.item_map.max() == len(near.items)
    outside = view(scene, (-100, -100, 0, 0), (50, 50))
    assert not outside.items and not outside.item_map.any() and outside.image.getextrema() == ((0, 0),) * 3


def test_views_carry_labels() -> None:
    shown = Views(NEXT, "train", 0, 0, 40)
    for i in range(12):
        assert (shown[i]["shape"] > 0).any()
    grown = MergedPatches(QWEN_VL, "train", 0, 0, 64)
    for i in (0, 15, 16, 32):
        found = grown[i]
        rows, cols = found["shape"].shape
        assert found["grid"].tolist() == [1, 2 * rows, 2 * cols] and LEAST <= rows * cols <= MOST
        assert len(found["pixels"]) == 4 * rows * cols
        assert ((found["shape"] > 0) | (found["shape"] == IGNORE)).any()
    assert grown[0]["grid"].equal(grown[15]["grid"])


def test_exercises_name_merged_patches() -> None:
    import torch

    tokenizer = build_tokenizer(qwen=True)
    branches = SizedBranches(QWEN_VL, tokenizer, 0, 0, 320, torch.ones(1))
    row, grid = branches[2], branches._image_inputs(branches._scene(2))["grid"]
    words = tokenizer.decode(row["ids"]).split()
    places = [int(word[1:]) for word in words if word[0] == "r" and word[1:].isdigit()]
    assert places and max(places) < int(grid[1]) // 2
