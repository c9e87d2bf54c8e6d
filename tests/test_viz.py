"""Overlays: the right patches bright, the right ones dim, legible, and wrong input refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trio.errors import InputError
from trio.report import CompressionReport, GroupReport, ImageReport, Origins, SampleReport, StageReport
from trio.report.draw import Kept, overlay, overlay_from_report, seen_region

GAP, PANEL = 16, 384
COLOUR = (40, 200, 90)


def plain(size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, COLOUR)


def panel(sheet: Image.Image, index: int, *, per_row: int = 4, width: int = PANEL) -> Image.Image:
    """The image of a panel of the first row (square panels)."""
    assert index < per_row
    left = GAP + index * (width + GAP)
    return sheet.crop((left, GAP, left + width, GAP + width))


def middle(image: Image.Image, grid: tuple[int, int], row: int, column: int) -> tuple[int, ...]:
    x, y = (column + 0.5) * image.width / grid[1], (row + 0.5) * image.height / grid[0]
    found = image.getpixel((int(x), int(y)))
    assert isinstance(found, tuple)
    return found


def bright(image: Image.Image, grid: tuple[int, int]) -> set[tuple[int, int]]:
    """Cells whose middle has the image's own colour."""
    return {(r, c) for r in range(grid[0]) for c in range(grid[1]) if middle(image, grid, r, c) == COLOUR}


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    data=st.data(),
)
def test_exactly_the_kept_patches_are_bright(grid: tuple[int, int], data: st.DataObject) -> None:
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    kept = data.draw(st.sets(st.sampled_from(cells)))
    drawn = overlay(plain(), [Kept([r for r, _ in kept], [c for _, c in kept], grid)])
    assert bright(panel(drawn, 0), grid) == set(cells)
    assert bright(panel(drawn, 1), grid) == kept


def test_dropped_patches_are_darker_and_greyer() -> None:
    drawn = panel(overlay(plain(), [Kept([0], [0], (2, 2))]), 1)
    dim = middle(drawn, (2, 2), 1, 1)
    assert max(dim) < 0.5 * max(COLOUR)
    assert max(dim) - min(dim) < 0.3 * (max(COLOUR) - min(COLOUR))


def test_outline_around_kept_patches_heavier_for_merged_ones() -> None:
    thin = panel(overlay(plain(), [Kept([1], [1], (3, 3))]), 1)
    heavy = panel(overlay(plain(), [Kept([1], [1], (3, 3), sizes=[64])]), 1)
    assert thin.getpixel((128, 192)) == heavy.getpixel((128, 192)) == (255, 193, 7)
    assert thin.getpixel((130, 192)) == COLOUR
    assert heavy.getpixel((131, 192)) == (255, 193, 7)
    assert heavy.getpixel((134, 192)) == COLOUR


def test_small_images_are_scaled_up_and_large_ones_down() -> None:
    for size in ((10, 10), (96, 96), (3000, 3000)):
        assert overlay(plain(size), [Kept([0], [0], (2, 2))]).width == 2 * PANEL + 3 * GAP
    tall = overlay(plain((100, 400)), [Kept([0], [0], (8, 2))])
    assert tall.height > PANEL
    assert overlay(plain((1, 500)), []).size[1] > PANEL


def test_panels_wrap_into_equal_rows() -> None:
    stages = [Kept([0], [0], (2, 2), f"stage {n}") for n in range(5)]
    wide, tall = overlay(plain(), stages, per_row=6), overlay(plain(), stages, per_row=4)
    assert wide.width == 6 * PANEL + 7 * GAP
    assert tall.width == 3 * PANEL + 4 * GAP
    assert tall.height > 1.9 * wide.height
    assert overlay(plain(), stages, per_row=1).width == PANEL + 2 * GAP


def test_captions_are_drawn_and_differ() -> None:
    def strip(caption: str) -> bytes:
        drawn = overlay(plain(), [Kept([0], [0], (2, 2), caption)])
        return drawn.crop((GAP + PANEL + GAP, GAP + PANEL, drawn.width, drawn.height)).tobytes()

    empty, one, other = strip(""), strip("after layer 4: 48 of 144"), strip("after layer 4: 16 of 144")
    assert set(empty) == {255}
    assert len({empty, one, other}) == 3
    drawn = overlay(plain((20, 400)), [Kept([0], [0], (2, 2), "a caption that is far too long for so narrow a panel")])
    margin = drawn.crop((drawn.width - GAP // 2, 0, drawn.width, drawn.height))
    assert set(margin.tobytes()) == {255}  # shrunk to fit, not cut off


def test_region_places_the_grid_and_leaves_the_rest_dim() -> None:
    image = plain((400, 200))
    drawn = overlay(image, [Kept([0, 0, 1, 1], [0, 1, 0, 1], (2, 2))], region=(100, 0, 300, 200))
    left = GAP + PANEL + GAP
    body = drawn.crop((left, GAP, left + PANEL, GAP + PANEL // 2))
    assert bright(body, (2, 4)) == {(0, 1), (1, 1), (0, 2), (1, 2)}


def test_transparency_is_shown_on_white() -> None:
    image = Image.new("RGBA", (96, 96), (200, 0, 0, 0))
    assert panel(overlay(image, []), 0).getpixel((100, 100)) == (255, 255, 255)
    for mode in ("L", "P", "CMYK", "1", "I;16"):
        assert overlay(Image.new(mode, (8, 8)), []).mode == "RGB"


def test_heat_adds_a_panel_that_ranks() -> None:
    heat = {(0, 0): 1e-9, (0, 1): 5.0, (1, 0): 2e-9}
    drawn = overlay(plain(), [Kept([0], [1], (2, 2), heat=heat)])
    assert drawn.width == 3 * PANEL + 4 * GAP
    shown = panel(drawn, 1)
    low, best, between, absent = (sum(middle(shown, (2, 2), r, c)) for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)))
    assert low < between < best
    assert len(set(middle(shown, (2, 2), 1, 1))) == 1 and absent  # grey: the token was gone before
    assert overlay(plain(), [Kept([0], [1], (2, 2), heat={(0, 1): 1.0})]).width == drawn.width


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Kept([0], [], (2, 2)), "1 rows, 0 columns"),
        (lambda: Kept([0], [0], (2, 2), sizes=[1, 2]), "2 sizes"),
        (lambda: Kept([0], [0], (2, 2), sizes=[0]), "size of 0"),
        (lambda: Kept([2], [0], (2, 2)), r"row 2, column 0\) lies outside the grid of 2 x 2"),
        (lambda: Kept([0], [-1], (2, 2)), "column -1"),
        (lambda: Kept([], [], (2, 2), heat={(0, 5): 1.0}), "column 5"),
        (lambda: Kept([], [], (0, 2)), "at least one row"),
        (lambda: overlay(plain(), [], panel_px=10), "panel_px: found 10; allowed are 64 to 4096"),
        (lambda: overlay(plain(), [], per_row=0), "per_row: found 0"),
        (lambda: overlay(plain(), [], region=(0, 0, 97, 96)), "within the image of 96 x 96"),
        (lambda: overlay(plain(), [], region=(5, 0, 5, 96)), "left < right"),
        (lambda: overlay(Image.new("RGB", (0, 5)), []), "found 0 x 5 pixels"),
    ],
)
def test_wrong_input_is_refused(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


# What the model saw --------------------------------------------------------------------------------------------------


def processor(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(image_processor=SimpleNamespace(**values))


@pytest.mark.parametrize(
    ("size", "values", "box"),
    [
        ((640, 480), {"do_center_crop": False}, (0, 0, 640, 480)),
        ((640, 480), {}, (0, 0, 640, 480)),
        (
            (640, 480),
            {"do_center_crop": True, "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}},
            (80, 0, 560, 480),
        ),
        ((640, 480), {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 256}}, (110, 30, 530, 450)),
        (
            (100, 200),
            {"do_center_crop": True, "crop_size": 50, "do_resize": False},
            (25, 75, 75, 125),
        ),
        (
            (100, 200),
            {"do_center_crop": True, "crop_size": 50, "size": {"height": 100, "width": 100}},
            (25, 50, 75, 150),
        ),
        ((100, 200), {"do_center_crop": True, "crop_size": 300, "do_resize": False}, (0, 0, 100, 200)),
    ],
)
def test_the_region_that_the_processor_leaves(size: tuple[int, int], values: dict[str, Any], box: Any) -> None:
    assert seen_region(plain(size), processor(**values)) == pytest.approx(box)
    assert seen_region(plain(size), processor(**values).image_processor) == pytest.approx(box)


def test_the_region_of_a_stock_processor_is_what_its_pixels_show() -> None:
    from transformers import CLIPImageProcessor

    stock = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False)
    image = Image.new("RGB", (96, 32), (0, 0, 0))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    assert seen_region(image, stock) == (32, 0, 64, 32)
    pixels = stock(image, return_tensors="pt")["pixel_values"]
    assert float(pixels.mean()) > 0.95  # the white third, and nothing else


# From a report -------------------------------------------------------------------------------------------------------


def group(image: int | None, origins: Origins, tokens_in: int, saliency: list[float] | None = None) -> GroupReport:
    return GroupReport(
        image=image,
        tokens_in=tokens_in,
        asked=len(origins),
        kept=len(origins),
        indices=list(range(len(origins))),
        origins=origins,
        saliency=saliency,
    )


def report(images: list[ImageReport], stages: list[list[GroupReport]]) -> CompressionReport:
    made = [
        StageReport(after_layer=2 + 2 * n, scorer="random", selector="top-k", groups=groups)
        for n, groups in enumerate(stages)
    ]
    sample = SampleReport(sample=0, images=images, stages=made)
    return CompressionReport(
        spec_name="made",
        model="Model",
        adapter="llava",
        num_layers=1,
        samples=[sample, SampleReport(sample=1, images=[])],
        layer_lengths=[9],
        layer_tokens=[[9], [9]],
        positions="compact",
    )


SQUARE = ImageReport(tokens=16, grid=(4, 4))
GRID = Origins.of_grid(4, 4)


def test_a_report_with_two_stages() -> None:
    made = report([SQUARE], [[group(0, GRID.take([0, 5, 15]), 16)], [group(0, GRID.take([5]), 3)]])
    drawn = overlay_from_report(plain(), made)
    assert bright(panel(drawn, 1), (4, 4)) == {(0, 0), (1, 1), (3, 3)}
    assert bright(panel(drawn, 2), (4, 4)) == {(1, 1)}
    assert drawn.tobytes() == overlay_from_report([plain()], made).tobytes()


@pytest.mark.parametrize("shared", [False, True])
def test_two_images_one_below_the_other(shared: bool) -> None:
    first, second = GRID.take([1]), Origins.of_grid(2, 2, image=1).take([3])
    both = Origins(**{name: getattr(first, name) + getattr(second, name) for name in type(first).model_fields})
    saliency = [float(n) for n in range(20)]
    groups = (
        [group(None, both, 20, saliency)]
        if shared
        else [group(0, first, 16, saliency[:16]), group(1, second, 4, saliency[16:])]
    )
    made = report([SQUARE, ImageReport(tokens=4, grid=(2, 2))], [groups])
    drawn = overlay_from_report([plain(), plain()], made)
    half = drawn.height // 2
    assert bright(panel(drawn, 1), (4, 4)) == {(0, 1)}
    assert bright(panel(drawn.crop((0, half, drawn.width, drawn.height)), 1), (2, 2)) == {(1, 1)}
    hot = overlay_from_report([plain(), plain()], made, heat=True)
    lower = panel(hot.crop((0, half, hot.width, hot.height)), 1)
    values = [sum(middle(lower, (2, 2), r, c)) for r in (0, 1) for c in (0, 1)]
    assert values == sorted(values) and values[0] < values[-1]


def test_heat_of_a_later_stage_sits_where_the_earlier_one_kept() -> None:
    made = report(
        [SQUARE],
        [
            [group(0, GRID.take([0, 5, 15]), 16, [float(n) for n in range(16)])],
            [group(0, GRID.take([5]), 3, [0.0, 2.0, 1.0])],
        ],
    )
    shown = panel(overlay_from_report(plain(), made, heat=True, per_row=5), 3, per_row=5)
    coloured = {(r, c) for r in range(4) for c in range(4) if len(set(middle(shown, (4, 4), r, c))) > 1}
    assert coloured == {(0, 0), (1, 1), (3, 3)}
    ranked = [sum(middle(shown, (4, 4), n, n)) for n in (0, 3, 1)]
    assert ranked == sorted(ranked) and ranked[0] < ranked[2]


def test_merged_tokens_and_the_class_token() -> None:
    origins = Origins(
        image=[0, 0, 0],
        kind=["cls", "merged", "patch"],
        frame=[0, 0, 0],
        row=[0, 2, 3],
        column=[0, 2, 3],
        size=[1, 9, 1],
    )
    made = report([ImageReport(tokens=17, grid=(4, 4))], [[group(0, origins, 17)]])
    assert bright(panel(overlay_from_report(plain(), made), 1), (4, 4)) == {(2, 2), (3, 3)}


def test_frames_of_a_video_are_drawn_on_their_own_images() -> None:
    late = Origins.of_grid(2, 2, frame=1).take([2])
    made = report([ImageReport(tokens=8, grid=(2, 2))], [[group(0, late, 8, [float(n) for n in range(8)])]])
    drawn = overlay_from_report([[plain(), plain()]], made, heat=True)
    half = drawn.height // 2
    upper, lower = drawn.crop((0, 0, drawn.width, half)), drawn.crop((0, half, drawn.width, drawn.height))
    assert bright(panel(upper, 2), (2, 2)) == set()
    assert bright(panel(lower, 2), (2, 2)) == {(1, 0)}
    with pytest.raises(InputError, match="a token of frame 1, but 1 frames were given"):
        overlay_from_report([plain()], made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": 2}, "sample: found 2, but the report is of 2 samples"),
        ({"sample": -1}, "sample: found -1"),
        ({"sample": 1}, "sample 1 has no image"),
        ({"images": [plain(), plain()]}, "found 2, but sample 0 has 1"),
        ({"regions": []}, "regions: found 0 for 1 images"),
        ({"heat": True}, "report level 'full'"),
    ],
)
def test_what_does_not_fit_the_report_is_refused(arguments: dict[str, Any], message: str) -> None:
    made = report([SQUARE], [[group(0, GRID.take([5]), 16)]])
    values = {"images": plain(), "report": made} | arguments
    with pytest.raises(InputError, match=message):
        overlay_from_report(**values)


def test_tokens_without_a_grid_are_refused_by_name() -> None:
    made = report([ImageReport(tokens=16)], [[group(0, GRID.take([5]), 16)]])
    with pytest.raises(InputError, match="image 0 of sample 0 has no grid"):
        overlay_from_report(plain(), made)
    odd = report([ImageReport(tokens=17, grid=(4, 4))], [[group(0, GRID.take([5]), 17, [0.5] * 17)]])
    with pytest.raises(InputError, match="not one plain grid"):
        overlay_from_report(plain(), odd, heat=True)


def test_a_tiled_image_is_drawn_once_whole_and_once_in_tiles() -> None:
    whole, tiles = Origins.of_grid(4, 4), Origins.of_grid(2, 6, frame=1)
    origins = Origins(**{name: getattr(whole, name) + getattr(tiles, name) for name in Origins.model_fields})
    image = ImageReport(tokens=28, grids=[(4, 4), (2, 6)])
    made = report([image], [[group(0, origins.take([0, 5, 16, 27]), 28)]])
    drawn = overlay_from_report(plain(), made)
    assert drawn.height > 1.5 * overlay_from_report(plain(), report([SQUARE], [[group(0, GRID.take([5]), 16)]])).height
    upper, lower = (drawn.crop((0, y, drawn.width, y + drawn.height // 2)) for y in (0, drawn.height // 2))
    assert bright(panel(upper, 1), (4, 4)) == {(0, 0), (1, 1)}
    assert bright(panel(lower, 1), (2, 6)) == {(0, 0), (1, 5)}


def test_tokens_whose_place_is_not_known_are_not_drawn() -> None:
    made = report([ImageReport(tokens=16, grid=(1, 16), placed=False)], [[group(0, GRID.take([5]), 16)]])
    with pytest.raises(InputError, match="does not know where on the image"):
        overlay_from_report(plain(), made)
