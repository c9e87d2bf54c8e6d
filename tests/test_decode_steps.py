"""A decoding step of an attached pipeline: graphs, launches and waits beside those of the stock model."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
from support.families import family
from support.models import inputs, llava
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import trio
from trio.core.upstream import Role, cache_of, keywords
from trio.runtime import shrink
from trio.testing import Prompt

STAGES = [trio.Stage(after_layer=layer, keep=keep) for layer, keep in ((1, "50%"), (2, "25%"), (3, "15%"))]
ONE, RAGGED = [[5, "image", 6, 7, 8]], [[5, "image", 6, 7], [8, "image", "image", 9, 10, 11]]
STEPS = 4


# Compiled


def compiled_steps(model: Any, batch: dict[str, Any], steps: int = STEPS) -> tuple[list[int], int, list[torch.Tensor]]:
    """Graphs compiled in each decoding step, graph breaks in all, and the logits of the steps."""
    torch._dynamo.reset()
    counters.clear()
    graphs, logits, count = [], [], 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    with torch.no_grad():
        cache = cache_of(model(**batch, **keywords({Role.USE_CACHE: True})))
        step = torch.compile(model, backend=backend)
        for number in range(steps):
            before = count
            ids = torch.full((len(batch["input_ids"]), 1), 9 + number)
            logits.append(step(**keywords({Role.IDS: ids, Role.CACHE: cache, Role.USE_CACHE: True})).logits)
            graphs.append(count - before)
    return graphs, sum(counters["graph_break"].values()), logits


def eager_steps(model: Any, batch: dict[str, Any], steps: int = STEPS) -> list[torch.Tensor]:
    with torch.no_grad():
        cache = cache_of(model(**batch, **keywords({Role.USE_CACHE: True})))
        every = [torch.full((len(batch["input_ids"]), 1), 9 + number) for number in range(steps)]
        return [model(**keywords({Role.IDS: ids, Role.CACHE: cache})).logits for ids in every]


@pytest.mark.parametrize(
    ("name", "positions"), [("llava", "original"), ("llava", "compact"), ("qwen2.5-vl", "original")]
)
def test_a_compiled_step_is_one_graph_as_the_stock_models(name: str, positions: Any):
    if name == "llava":
        model, batch = llava(layers=3), inputs(ONE)
    else:
        model, make = family(name)
        batch = dict(make([Prompt("what is", 1, "in here")]))
    stock, stock_breaks, _ = compiled_steps(model, batch)
    with trio.Pipeline(model, stages=STAGES[:2], positions=positions):
        ours, breaks, logits = compiled_steps(model, batch)
        expected = eager_steps(model, batch)
    assert breaks == stock_breaks
    assert ours == stock
    for one, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_compiled_step_refuses_what_an_eager_one_refuses():
    """The checks are traced too: a cache that another pipeline reduced, in a step that was compiled before."""
    model, batch = llava(layers=3), inputs(ONE)
    with trio.Pipeline(model, stages=STAGES[:2]) as pipeline, torch.no_grad():
        cache = cache_of(model(**batch, **keywords({Role.USE_CACHE: True})))
        step = torch.compile(model, backend="eager")
        ids = torch.tensor([[9]])
        step(**keywords({Role.IDS: ids, Role.CACHE: cache}))
        cache.layers[2].keys = cache.layers[2].keys[..., :-1, :]
        with pytest.raises(trio.TrioError, match="stands for"):
            step(**keywords({Role.IDS: ids, Role.CACHE: cache}))
        pipeline.detach()
        cache.layers[2].keys = torch.cat([cache.layers[2].keys, cache.layers[2].keys[..., -1:, :]], 2)
        with pytest.raises(trio.TrioError, match="not attached any more"):
            step(**keywords({Role.IDS: ids, Role.CACHE: cache}))


# Launches and waits


class Count(TorchDispatchMode):
    """Counts operators that are no views, and those for whose value the host waits."""

    WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            self.waits.append("".join(traceback.format_stack(limit=12)))
        elif not func.is_view:
            self.launches += 1
        return func(*args, **(kwargs or {}))


def counted(model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, steps: int = 5) -> list[Count]:
    """The counts of each forward of `generate`."""
    counts: list[Count] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Count() as count:
            out = forward(self, *args, **kwargs)
        counts.append(count)
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(model), "forward", counting)
        model.generate(**batch, max_new_tokens=steps, do_sample=False)
    return counts


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_of_generate_costs_at_most_eight_launches_and_no_wait(attention, rows, positions, monkeypatch):
    model, batch = llava(layers=4, attention=attention), inputs(rows)
    stock = counted(model, batch, monkeypatch)
    with trio.Pipeline(model, stages=STAGES, positions=positions):
        ours = counted(model, batch, monkeypatch)
    for number in range(1, len(stock)):
        assert len(ours[number].waits) <= len(stock[number].waits), ours[number].waits
        if number > 1:  # the first one builds masks that serve the next steps
            assert ours[number].launches <= stock[number].launches + 8


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_built_ahead_change_no_token(attention, beams, monkeypatch):
    model, batch = llava(layers=4, attention=attention), inputs(RAGGED)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    outputs = []
    for ahead in (0, 2, 64):
        monkeypatch.setattr(shrink, "STEPS_AHEAD", ahead)
        with trio.Pipeline(model, stages=STAGES, positions="compact"), torch.no_grad():
            outputs.append(model.generate(**batch, **settings, output_scores=True, return_dict_in_generate=True))
    for other in outputs[1:]:
        assert torch.equal(outputs[0].sequences, other.sequences)
        for one, two in zip(outputs[0].scores, other.scores, strict=True):
            torch.testing.assert_close(one, two)


def test_a_mask_of_the_callers_own_loop_is_looked_at():
    """Padding in the middle of a conversation: the same as a batch where that sample came alone."""
    model, batch = llava(layers=4), inputs(RAGGED)
    with trio.Pipeline(model, stages=STAGES), torch.no_grad():
        logits = []
        for second in (torch.tensor([[9, 10], [0, 11]]), torch.tensor([[9, 10], [12, 11]])):
            cache = cache_of(model(**batch, **keywords({Role.USE_CACHE: True})))
            mask = torch.cat([batch["attention_mask"], torch.tensor([[1, 1], [0, 1]])], 1)
            for step in range(2):
                here = keywords({Role.IDS: second[:, step : step + 1], Role.CACHE: cache})
                out = model(**here, **keywords({Role.MASK: mask[:, : mask.shape[1] - 1 + step]}))
            logits.append(out.logits)
    torch.testing.assert_close(logits[0], logits[1])
