"""Predictions against what a compressed run of a stock model really computes, holds and reports."""

from typing import Any

import pytest
import torch
from support.models import GRID, IMAGE_TOKEN, llava
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import trio
from trio.cost import flops, of_report, predict, shape_of

TEXT_TOKENS = 9


class Counter(TorchDispatchMode):
    """FLOPs of what runs, also inside `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def inputs(images: int = 1, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = [1, 5] + [IMAGE_TOKEN] * GRID**2 * images + list(range(10, 10 + TEXT_TOKENS - 2))
    return {
        "input_ids": torch.tensor([ids] * batch),
        "attention_mask": torch.ones(batch, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(batch * images, 3, GRID * 4, GRID * 4, generator=generator),
    }


def stages(scorer: str, selector: str) -> list[dict[str, Any]]:
    return [
        {"after_layer": 1, "keep": 9, "scorer": scorer, "selector": selector},
        {"after_layer": 4, "keep": 3, "scorer": scorer, "selector": selector},
    ]


@pytest.mark.parametrize("scorer", ["objective-gradient", "last-token-attention", "random"])
@torch.no_grad()
def test_a_compressed_prefill_computes_what_was_predicted(scorer: str) -> None:
    model = llava(attention="eager")
    shape = shape_of(model.config)
    pipeline = trio.Pipeline(model, stages=stages(scorer, "top-k"), name="made")
    with pipeline, Counter() as counter:
        model(**inputs(), logits_to_keep=1)
    made = predict(pipeline.spec, shape, images=(GRID**2,), text_tokens=TEXT_TOKENS)
    assert of_report(pipeline.report, pipeline.spec, shape) == made
    with Counter() as table:  # of rotary angles: a matrix product in some versions of transformers, never counted here
        model.model.language_model.rotary_emb(
            torch.zeros(1, 1, shape.hidden), torch.arange(GRID**2 + TEXT_TOKENS)[None]
        )
    assert counter.total - table.total == made.compressed.flops.total
    assert made.compressed.flops.prefill < made.full.flops.prefill


@torch.no_grad()
def test_nms_of_one_block_computes_all_pairs() -> None:
    model = llava(attention="eager")
    shape = shape_of(model.config)
    totals = {}
    for selector in ("top-k", "nms"):
        with trio.Pipeline(model, stages=stages("random", selector)) as pipeline, Counter() as counter:
            model(**inputs(), logits_to_keep=1)
        totals[selector] = counter.total, predict(pipeline.spec, shape, images=(GRID**2,), text_tokens=TEXT_TOKENS)
    (plain, _), (counted, made) = totals["top-k"], totals["nms"]
    expected = flops.similarity_flops(shape, 16, 16) + flops.similarity_flops(shape, 9, 9)
    assert made.compressed.flops.selection == counted - plain == expected


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (2, 1), (1, 3)])
@torch.no_grad()
def test_measured_cache_bytes_are_the_predicted_ones(images: int, batch: int) -> None:
    model = llava()
    shape = shape_of(model.config, dtype_bytes=4)
    pipeline = trio.Pipeline(model, stages=stages("random", "top-k"), report="full")
    with pipeline:
        model(**inputs(images, batch), use_cache=True)
    made = of_report(pipeline.report, pipeline.spec, shape)
    measured = pipeline.report.kv_bytes
    assert measured is not None
    assert (measured.full_equivalent, measured.measured) == (made.full.kv_bytes, made.compressed.kv_bytes)
    assert made.kv_reduction == measured.reduction
    assert made.average_kept == pytest.approx(pipeline.report.average_kept)
    assert made.retention == pytest.approx(pipeline.report.retention)
