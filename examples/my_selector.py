"""A selector of one's own, in one file outside the package: ``python examples/my_selector.py``.

``docs/add-a-selector.md`` explains it line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field

import trio
from trio.core.ops import first_k, ranking
from trio.core.part import Choice, IntRange
from trio.core.shape import ModelShape


@trio.SELECTORS.register("cells")
class Cells(trio.Selector):
    """The most salient token of every cell of a coarse grid, then the second of every cell, and so on.

    Tokens whose position is not known share one cell.

    Parameters:
        cells: rows and columns of the grid that lies over each image.
    """

    cells: Annotated[int, Field(ge=1, le=64)] = 4

    def select(self, ctx: trio.SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`; features are not looked at."""
        order = ranking(ctx.saliency, ctx.valid)  # (G, N): best first, padding last
        known = ctx.origins.grid_positions.nan_to_num(0.0, 0.0, 0.0)
        row, column = (known * self.cells).long().clamp(0, self.cells - 1).unbind(-1)
        cell = ((ctx.origins.image * self.cells + row) * self.cells + column).gather(1, order)
        turn = turn_in_cell(cell).masked_fill(~ctx.valid.gather(1, order), order.shape[1])
        return first_k(order.gather(1, turn.sort(dim=1, stable=True).indices), ctx.k)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """See `Selector.flops`; sorting is not counted."""
        return 0

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """See `Selector.search_space`."""
        return {"cells": IntRange(2, 8)}


def turn_in_cell(cell: torch.Tensor) -> torch.Tensor:
    """How many entries of the same row before each one have its number: ``[7, 3, 7, 7]`` gives ``[0, 0, 1, 2]``."""
    together = cell.sort(dim=1, stable=True)
    index = torch.arange(cell.shape[1], device=cell.device).expand_as(cell)
    begins = torch.ones_like(cell, dtype=torch.bool)
    begins[:, 1:] = together.values.diff(dim=1) != 0
    begin = index.where(begins, 0).cummax(dim=1).values
    return torch.empty_like(cell).scatter(1, together.indices, index - begin)


def main() -> None:
    """Checks the selector, then uses it by name on the bundled model."""
    from PIL import Image

    from trio.testing import check_selector

    print(check_selector(Cells(cells=3)))

    model, processor = trio.zoo.load("tiny-llava")
    content = [{"type": "image"}, {"type": "text", "text": trio.zoo.demo_question()}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[Image.open(trio.zoo.demo_image())], return_tensors="pt")
    stage = {"after_layer": "25%", "keep": "33.3%", "selector": {"name": "cells", "cells": 3}}
    pipeline = trio.Pipeline.from_spec({"version": 1, "name": "mine", "stages": [stage]}, model)
    with pipeline:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(trio.zoo.demo_question(), processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(pipeline.report.summary())


if __name__ == "__main__":
    main()
