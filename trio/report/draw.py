"""Images of what was kept: one panel a stage, with Pillow only.

Kept patches stay bright inside a thin outline, dropped ones turn grey and dark. The grid of visual tokens covers the
part of the image that the model saw, which is less than the image where an image processor crops (`seen_region`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from ..errors import InputError
from . import CompressionReport, GroupReport, ImageReport, Origins, SampleReport, StageReport

__all__ = ["Box", "Kept", "overlay", "overlay_from_report", "seen_region"]

#: left, top, right, bottom in pixels of the image, as Pillow counts them.
Box = tuple[float, float, float, float]

_PAPER, _INK, _FAINT = (255, 255, 255), (33, 37, 41), (108, 117, 125)
_OUTLINE = (255, 193, 7)
_GAP, _SMALLEST, _LARGEST = 16, 64, 4096
# Viridis at five points (matplotlib, CC0): dark for low, light for high, readable without colour too.
_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Kept:
    """The tokens that one panel shows on the image.

    Attributes:
        rows: row of each kept token on the grid, from 0 at the top.
        columns: column of each kept token, from 0 at the left; as many as `rows`.
        grid: (rows, columns) of the grid.
        caption: the line under the panel.
        sizes: how many patches each kept token stands for; larger ones get a heavier outline. Empty: 1 each.
        heat: saliency by (row, column); adds a panel that shows it. Empty: no such panel.
        heat_caption: the line under that panel.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    grid: tuple[int, int]
    caption: str = ""
    sizes: Sequence[int] = ()
    heat: Mapping[tuple[int, int], float] = field(default_factory=dict)
    heat_caption: str = "saliency (by rank)"

    def __post_init__(self) -> None:
        """Checks lengths and ranges.

        Raises:
            InputError: the columns differ in length, or a place lies outside the grid.
        """
        if min(self.grid) < 1:
            raise InputError(f"grid: found {self.grid}; a grid has at least one row and one column.")
        if len(self.rows) != len(self.columns) or (self.sizes and len(self.sizes) != len(self.rows)):
            raise InputError(
                f"kept tokens: found {len(self.rows)} rows, {len(self.columns)} columns and {len(self.sizes)} sizes; "
                "give one of each for every token (or no sizes at all)."
            )
        if min(self.sizes, default=1) < 1:
            raise InputError(f"kept tokens: found a size of {min(self.sizes)}; a token stands for 1 patch or more.")
        for row, column in (*zip(self.rows, self.columns, strict=True), *self.heat):
            if not (0 <= row < self.grid[0] and 0 <= column < self.grid[1]):
                raise InputError(
                    f"kept tokens: (row {row}, column {column}) lies outside the grid of {self.grid[0]} x "
                    f"{self.grid[1]}. Give the grid that the tokens come from."
                )


def seen_region(image: Image.Image, image_processor: Any) -> Box:
    """The part of an image that the model sees, so that the grid is drawn where it belongs.

    A processor that resizes the shorter side and crops the centre (CLIP, so LLaVA-1.5) sees the centre; others squeeze
    the whole image into their input.

    Args:
        image: as it was given to the processor.
        image_processor: a transformers image processor, or a processor that has one.

    Returns:
        The region in pixels of the image.
    """
    inner = getattr(image_processor, "image_processor", image_processor)
    width, height = image.size
    crop = getattr(inner, "crop_size", None)
    if not getattr(inner, "do_center_crop", False) or not crop:
        return (0.0, 0.0, float(width), float(height))
    side_x, side_y = _side(crop, "width"), _side(crop, "height")
    scale = 1.0
    if getattr(inner, "do_resize", True):
        size = getattr(inner, "size", crop)
        shortest = _side(size, "shortest_edge")
        if not shortest:  # resized to a fixed size: both sides scale on their own, then the crop takes the centre
            across, down = _side(size, "width") / width, _side(size, "height") / height
            return _centre(width, height, side_x / across, side_y / down)
        scale = shortest / min(width, height)
    return _centre(width, height, side_x / scale, side_y / scale)


def overlay(
    image: Image.Image,
    stages: Sequence[Kept],
    *,
    label: str = "",
    region: Box | None = None,
    panel_px: int = 384,
    per_row: int = 4,
) -> Image.Image:
    """One image with a panel for the original and one for each stage.

    Args:
        image: any size and mode; transparency is shown on white.
        stages: what each panel shows.
        label: the line under the original.
        region: the part of the image that the grid covers, see `seen_region`; None: all of it.
        panel_px: longer side of a panel in pixels, 64 to 4096; small images are scaled up to it.
        per_row: panels in a row before the next row begins, at least 1.

    Returns:
        An RGB image.

    Raises:
        InputError: a number is out of range, or the region is empty or outside the image.
    """
    if not _SMALLEST <= panel_px <= _LARGEST:
        raise InputError(f"panel_px: found {panel_px}; allowed are {_SMALLEST} to {_LARGEST} pixels.")
    if per_row < 1:
        raise InputError(f"per_row: found {per_row}; a row holds at least one panel.")
    box = _checked(region, image.size)
    base, box = _scaled(_on_white(image), box, panel_px)
    panels = [(base, label or "original")]
    for stage in stages:
        if stage.heat:
            panels.append((_heat_panel(base, box, stage), stage.heat_caption))
        panels.append((_kept_panel(base, box, stage), stage.caption))
    return _sheet(panels, per_row)


def overlay_from_report(
    images: Image.Image | Sequence[Image.Image | Sequence[Image.Image]],
    report: CompressionReport,
    *,
    sample: int = 0,
    heat: bool = False,
    regions: Sequence[Box | None] | None = None,
    panel_px: int = 384,
    per_row: int = 4,
) -> Image.Image:
    """What a run kept of the images of one sample; several images stand below each other.

    Args:
        images: the sample's image, or its images in the order of the prompt (of a video: its frames).
        report: of the run; level ``full`` where `heat` is asked for.
        sample: row of the batch.
        heat: also show the saliencies, by rank: the brightest was the best.
        regions: for each image the part that the model saw (`seen_region`); None: all of it.
        panel_px: longer side of a panel in pixels.
        per_row: panels in a row.

    Returns:
        An RGB image.

    Raises:
        InputError: sample, images or grids do not fit the report, or it holds no saliencies and `heat` is asked for.
    """
    given = [images] if isinstance(images, Image.Image) else list(images)
    if not 0 <= sample < len(report.samples):
        raise InputError(f"sample: found {sample}, but the report is of {len(report.samples)} samples, counted from 0.")
    record = report.samples[sample]
    if not record.images:
        raise InputError(f"sample {sample} has no image, so there is nothing to draw; choose a sample that has one.")
    if len(given) != len(record.images):
        raise InputError(
            f"images: found {len(given)}, but sample {sample} has {len(record.images)}; give each one, in the "
            "order of the prompt."
        )
    if regions is not None and len(regions) != len(given):
        raise InputError(f"regions: found {len(regions)} for {len(given)} images; give one for each, or None.")
    sheets = []
    for number, (image, image_report) in enumerate(zip(given, record.images, strict=True)):
        if not image_report.placed:
            raise InputError(
                f"image {number} of sample {sample}: the adapter {report.adapter!r} does not know where on the image "
                "its tokens lie, so they cannot be drawn."
            )
        tiled = len(image_report.grids) > 1  # the whole image and its tiles: views of one and the same image
        frames = [image] if isinstance(image, Image.Image) else list(image)
        frames = frames * len(image_report.grids) if tiled else frames
        for frame, shown in enumerate(frames):
            label = _label(number, len(given), frame, len(frames), image_report, tiled)
            stages = [_shown(record, step, number, frame, len(frames), heat) for step in _steps(record)]
            region = regions[number] if regions is not None else None
            sheets.append(overlay(shown, stages, label=label, region=region, panel_px=panel_px, per_row=per_row))
    return _stacked(sheets)


# From a report to panels ---------------------------------------------------------------------------------------------


def _label(number: int, images: int, frame: int, frames: int, image: ImageReport, tiled: bool) -> str:
    what = [f"image {number + 1} of {images}"] if images > 1 else []
    if tiled:
        what += ["tiles" if frame else "whole image"]
    elif frames > 1:
        what += [f"frame {frame + 1} of {frames}"]
    return f"{', '.join(what) or 'original'}: {image.tokens} tokens"


@dataclass(frozen=True)
class _Step:
    """A compressor or a stage.

    Attributes:
        what: how a caption names it.
        left: for each group its image (None: all of the sample's), and the origins of the tokens left.
        stage: the stage; None for a compressor.
    """

    what: str
    left: list[tuple[int | None, Origins]]
    stage: StageReport | None = None


def _steps(record: SampleReport) -> list[_Step]:
    """What happened to a sample, in order."""
    done = record.compressor
    steps = [] if done is None else [_Step(done.name, [(n, image.origins) for n, image in enumerate(done.images)])]
    for stage in record.stages:
        kept = [(group.image, group.origins) for group in stage.groups]
        steps.append(_Step(f"after layer {stage.after_layer}", kept, stage))
    return steps


def _shown(record: SampleReport, step: _Step, number: int, frame: int, frames: int, heat: bool) -> Kept:
    """What a step left of one frame of one image."""
    image = record.images[number]
    grid = image.grids[min(frame, len(image.grids) - 1)] if image.grids else image.grid
    if grid is None:
        raise InputError(
            f"image {number} of sample {record.sample} has no grid in the report, so its tokens cannot be drawn; give "
            "their places to `overlay`."
        )
    rows: list[int] = []
    columns: list[int] = []
    sizes: list[int] = []
    kept = 0
    for _, origins in step.left:
        for index in range(len(origins)):
            if origins.image[index] != number:
                continue
            if origins.frame[index] >= frames:
                raise InputError(
                    f"image {number} of sample {record.sample} has a token of frame {origins.frame[index]}, but "
                    f"{frames} frames were given; give every frame of a video, in order."
                )
            kept += 1
            if origins.frame[index] == frame and origins.kind[index] in ("patch", "merged"):
                rows.append(origins.row[index])
                columns.append(origins.column[index])
                sizes.append(max(1, origins.size[index]))
    caption = f"{step.what}: {kept} of {image.tokens}"
    if frames > 1:
        caption += f", {len(rows)} here"
    smallest = min(sizes, default=1)  # where every token stands for 2 x 2 patches, none is heavier than the others
    return Kept(
        rows,
        columns,
        grid,
        caption,
        [max(1, size // smallest) for size in sizes],
        _saliency(record, step, number, frame) if heat and step.stage is not None else {},
        f"saliency {step.what}, by rank",
    )


def _saliency(record: SampleReport, step: _Step, number: int, frame: int) -> dict[tuple[int, int], float]:
    """Saliency by place, of the tokens that entered the stage: those that the step before it left, or all."""
    steps = _steps(record)
    position = steps.index(step)
    earlier = steps[position - 1] if position else None
    by_cell: dict[tuple[int, int], float] = {}
    assert step.stage is not None  # a compressor has no saliency
    for group in step.stage.groups:
        if group.saliency is None:
            raise InputError(
                "heat: the report holds no saliencies. Run the pipeline with report level 'full', or draw without heat."
            )
        if group.image not in (None, number):
            continue
        places = _entered(record, earlier, group, number)
        if places is None:
            continue
        first, cells = places
        for offset, (at_frame, place) in enumerate(cells):
            if at_frame == frame:
                by_cell[place] = group.saliency[first + offset]
    return by_cell


def _entered(
    record: SampleReport, earlier: _Step | None, group: GroupReport, number: int
) -> tuple[int, list[tuple[int, tuple[int, int]]]] | None:
    """(position in the group's saliencies, (frame, place) of each token) of one image's tokens that entered a stage."""
    images = record.images if group.image is None else [record.images[group.image]]
    if earlier is not None:
        origins = [
            (o.image[i], o.frame[i], o.kind[i], (o.row[i], o.column[i]))
            for o in (one for _, one in earlier.left)
            for i in range(len(o))
            if group.image is None or o.image[i] == group.image
        ]
    elif all(image.grid is not None and image.start % (image.grid[0] * image.grid[1]) == 0 for image in images):
        numbers = range(len(record.images)) if group.image is None else [group.image]
        origins = [
            (n, i // (g[0] * g[1]), "patch", (i % (g[0] * g[1]) // g[1], i % g[1]))
            for n, image in zip(numbers, images, strict=True)
            if (g := image.grid) is not None
            for i in range(image.start)
        ]
    else:
        raise InputError(
            "heat: the tokens that entered the first stage are not one plain grid, so their places are not in the "
            "report. Draw without heat, or give the places to `overlay`."
        )
    mine = [i for i, origin in enumerate(origins) if origin[0] == number]
    if not mine:
        return None
    chosen = origins[mine[0] : mine[-1] + 1]
    places = [(frame if kind in ("patch", "merged") else -1, place) for _, frame, kind, place in chosen]
    return mine[0], places


# Panels --------------------------------------------------------------------------------------------------------------


def _side(size: Any, name: str) -> int:
    """One entry of a transformers size (a dict or a SizeDict), 0 where it has none; a plain number is every side."""
    if isinstance(size, int):
        return size
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return int(value or 0)


def _centre(width: float, height: float, across: float, down: float) -> Box:
    """A box of that size in the middle, cut where the crop is larger than the image (processors pad there)."""
    left, top = max(0.0, (width - across) / 2), max(0.0, (height - down) / 2)
    return (left, top, min(float(width), left + across), min(float(height), top + down))


def _checked(region: Box | None, size: tuple[int, int]) -> Box:
    width, height = size
    if min(size) < 1:
        raise InputError(f"image: found {width} x {height} pixels; give an image that is not empty.")
    if region is None:
        return (0.0, 0.0, float(width), float(height))
    left, top, right, bottom = region
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"region: found {region}; it must be left < right and top < bottom within the image of {width} x "
            f"{height} pixels."
        )
    return region


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_PAPER, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, box: Box, panel_px: int) -> tuple[Image.Image, Box]:
    scale = panel_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    across, down = size[0] / image.width, size[1] / image.height
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return resized, (box[0] * across, box[1] * down, box[2] * across, box[3] * down)


def _cell(box: Box, grid: tuple[int, int], row: int, column: int) -> tuple[int, int, int, int]:
    """First and last pixel of a cell, in the order that ImageDraw takes; at least one pixel large."""
    left, top, right, bottom = box
    x = [round(left + (right - left) * c / grid[1]) for c in (column, column + 1)]
    y = [round(top + (bottom - top) * r / grid[0]) for r in (row, row + 1)]
    return x[0], y[0], max(x[0], x[1] - 1), max(y[0], y[1] - 1)


def _kept_panel(base: Image.Image, box: Box, kept: Kept) -> Image.Image:
    dim = ImageEnhance.Brightness(ImageEnhance.Color(base).enhance(0.2)).enhance(0.4)
    mask = Image.new("L", base.size, 0)
    draw = ImageDraw.Draw(mask)
    places = list(zip(kept.rows, kept.columns, strict=True))
    for place in places:
        draw.rectangle(_cell(box, kept.grid, *place), fill=255)
    panel = Image.composite(base, dim, mask)
    _outline(panel, box, kept, places)
    return panel


def _outline(panel: Image.Image, box: Box, kept: Kept, places: Sequence[tuple[int, int]]) -> None:
    """Faint lines between kept cells, full ones around them, heavier ones around tokens that stand for many patches."""
    draw = ImageDraw.Draw(panel, "RGBA")
    among = set(places)
    edges: list[tuple[int, int, int, int]] = []
    for (row, column), size in zip(places, kept.sizes or [1] * len(places), strict=True):
        left, top, right, bottom = cell = _cell(box, kept.grid, row, column)
        room = min(right - left, bottom - top)
        if room < 4:
            continue  # it would be all outline
        draw.rectangle(cell, outline=(*_OUTLINE, 70))
        weight = min(1 + int(math.log2(size) / 2), room // 3)
        sides = {
            (row - 1, column): (left, top, right, top + weight - 1),
            (row + 1, column): (left, bottom - weight + 1, right, bottom),
            (row, column - 1): (left, top, left + weight - 1, bottom),
            (row, column + 1): (right - weight + 1, top, right, bottom),
        }
        edges += [line for beside, line in sides.items() if size > 1 or beside not in among]
    for line in edges:
        draw.rectangle(line, fill=(*_OUTLINE, 255))


def _heat_panel(base: Image.Image, box: Box, kept: Kept) -> Image.Image:
    dim = ImageEnhance.Brightness(ImageEnhance.Color(base).enhance(0.0)).enhance(0.5)
    ranked = sorted(kept.heat, key=lambda place: kept.heat[place])
    panel = dim.copy()
    draw = ImageDraw.Draw(panel)
    for rank, place in enumerate(ranked):
        draw.rectangle(_cell(box, kept.grid, *place), fill=_colour(rank / max(1, len(ranked) - 1)))
    return Image.blend(dim, panel, 0.7)


def _colour(share: float) -> tuple[int, int, int]:
    at = share * (len(_HEAT) - 1)
    low = min(int(at), len(_HEAT) - 2)
    first, second = _HEAT[low], _HEAT[low + 1]
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _sheet(panels: Sequence[tuple[Image.Image, str]], per_row: int) -> Image.Image:
    """Panels in rows of equal length, each with its caption underneath."""
    rows = math.ceil(len(panels) / per_row)
    across = math.ceil(len(panels) / rows)
    width, height = panels[0][0].size
    size = max(12, min(28, max(width, height) // 20))
    line = math.ceil(size * 1.9)
    column = max(width, size * 9)  # a narrow image still has room for its caption
    sheet = Image.new("RGB", (across * (column + _GAP) + _GAP, rows * (height + line + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (panel, caption) in enumerate(panels):
        x = _GAP + index % across * (column + _GAP) + (column - width) // 2
        y = _GAP + index // across * (height + line + _GAP)
        sheet.paste(panel, (x, y))
        font = _fitting(draw, caption, size, column)
        middle = (x + width / 2, y + height + line / 2)
        draw.text(middle, caption, font=font, fill=_INK if index else _FAINT, anchor="mm")
    return sheet


def _fitting(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> Any:
    """Pillow's own font, as large as `size` or as small as it takes to fit the text into `width` pixels."""
    while size > 8 and draw.textlength(text, font=ImageFont.load_default(size)) > width:
        size -= 1
    return ImageFont.load_default(size)


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    if len(sheets) == 1:
        return sheets[0]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), _PAPER)
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole
