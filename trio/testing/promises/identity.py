"""Promise 1: if no sample loses a token, logits are bitwise the stock model's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch

from ...core.prompts import Side
from ...spec import Keep, StageSpec
from ..bench import ONE, RAGGED, TEXT, Bench, Setting
from ..results import Case, require


def everything(bench: Bench) -> Setting:
    """The bench's first setting, but keeping all."""
    stages = [
        stage.model_copy(update={"keep": Keep.parse("100%")})
        if isinstance(stage, StageSpec)
        else {**stage, "keep": "100%"}
        for stage in bench.settings[0].stages
    ]
    compressor = bench.settings[0].compressor
    return Setting("keep 100%", stages, compressor=None if compressor is None else {**compressor, "keep": "100%"})


def cases(bench: Bench) -> Iterator[Case]:
    """A single image, ragged batches, generation, prompts without an image."""
    yield "keep 100%, one image", partial(_forward, bench, "left", False)
    yield "keep 100%, ragged batch padded on the left", partial(_forward, bench, "left", True)
    yield "keep 100%, ragged batch padded on the right", partial(_forward, bench, "right", True)
    yield "keep 100%, generation", partial(_generation, bench, "counts")
    yield "keep 100%, generation with a full report", partial(_generation, bench, "full")
    yield "a pipeline that drops, prompts without an image", partial(_text, bench)


def _forward(bench: Bench, side: Side, ragged: bool) -> str:
    inputs = bench.inputs(*(RAGGED if ragged else (ONE,)), side=side)
    stock = bench.forward(inputs)
    with bench.pipeline(everything(bench)):
        ours = bench.forward(inputs)
    return bitwise(ours, stock)


def _generation(bench: Bench, report: Literal["counts", "full"]) -> str:
    inputs = bench.inputs(*RAGGED)
    stock = bench.generate(inputs)
    with bench.pipeline(everything(bench), report=report):
        ours = bench.generate(inputs)
    require(torch.equal(ours.sequences, stock.sequences), "generated tokens differ from the stock model's")
    return bitwise(torch.stack(ours.logits), torch.stack(stock.logits))


def _text(bench: Bench) -> str:
    inputs = bench.inputs(TEXT)
    stock = bench.generate(inputs)
    with bench.pipeline():
        ours = bench.generate(inputs)
    return bitwise(torch.stack(ours.logits), torch.stack(stock.logits))


def bitwise(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Says that two tensors are equal bit by bit.

    Raises:
        AssertionError: they are not.
    """
    require(actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    different = int((actual != expected).sum())
    require(different == 0, f"{different} of {actual.numel()} logits are not bitwise the stock model's")
    return f"{actual.numel()} logits bitwise equal"
