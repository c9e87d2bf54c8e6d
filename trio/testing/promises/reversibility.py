"""Promise 2: after `detach`, also after an exception, nothing of ours is left and logits are bitwise as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..bench import ONE, RAGGED, Bench, reduced
from ..results import Case, require
from .identity import bitwise


class Planned(Exception):
    """Raised on purpose in the middle of a forward."""


def cases(bench: Bench) -> Iterator[Case]:
    """After a forward, after generation, after exceptions, and what works between."""
    yield "after a forward", partial(_detached, bench, "forward")
    yield "after generation", partial(_detached, bench, "generate")
    yield "after an exception in a decoder layer", partial(_detached, bench, "failing forward")
    yield "after an exception within generation", partial(_detached, bench, "failing generation")
    yield "attached, the forward after an exception", partial(_recovers, bench)


def _detached(bench: Bench, what: str) -> str:
    inputs = bench.inputs(*RAGGED)
    bench.generate(inputs)  # transformers leaves capture hooks of its own at a first call
    stock = bench.forward(inputs)
    first = footprint(bench.inner)
    bench.generate(inputs)
    before = footprint(bench.inner)
    own = {key for key in before.keys() | first.keys() if before.get(key) != first.get(key)}  # Qwen's rope_deltas
    pipeline = bench.pipeline()
    try:
        with pipeline:
            if what.startswith("failing"):
                with failing(bench):
                    bench.forward(inputs) if what.endswith("forward") else bench.generate(inputs)
            elif what == "forward":
                bench.forward(inputs)
            else:
                bench.generate(inputs)
    except Planned:
        pass
    else:
        require(not what.startswith("failing"), "the planned exception did not come through")
    after = footprint(bench.inner)
    keys = (before.keys() | after.keys()) - own
    changed = sorted(key for key in keys if before.get(key) != after.get(key))
    require(not changed, f"left behind or changed on the model: {', '.join(changed[:5])} ({len(changed)} in all)")
    return f"{len(after)} hooks and attributes as before, {bitwise(bench.forward(inputs), stock)}"


def _recovers(bench: Bench) -> str:
    inputs = bench.inputs(ONE)
    pipeline = bench.pipeline()
    with pipeline:
        expected = bench.forward(inputs)
        try:
            with failing(bench):
                bench.forward(inputs)
        except Planned:
            pass
        ours = bench.forward(inputs)
        reduced(pipeline.report)
    return bitwise(ours, expected)


@contextmanager
def failing(bench: Bench) -> Iterator[None]:
    """Makes the last decoder layer raise `Planned` for the block."""

    def raising(module: nn.Module, args: Any) -> None:
        raise Planned

    handle = bench.adapter.layers[-1].register_forward_pre_hook(raising)
    try:
        yield
    finally:
        handle.remove()


def footprint(model: nn.Module) -> dict[str, object]:
    """Everything on a model that a runtime could leave behind, by name: attributes, hooks, classes, settings.

    Tensors and containers are compared by identity of the entry, hooks by the function, settings by value.
    """
    out: dict[str, object] = {}
    for name, module in model.named_modules():
        out[f"{name}.__class__"] = type(module)
        for attribute, value in vars(module).items():
            place = f"{name}.{attribute}"
            if isinstance(value, dict):
                out.update({f"{place}[{key}]": id(entry) for key, entry in value.items()})
            elif callable(value) or isinstance(value, torch.Tensor | nn.Module):
                out[place] = id(value)
            else:
                out[place] = type(value)
    for name in ("config", "generation_config"):
        setting = getattr(model, name, None)
        if setting is not None:
            out[name] = repr(setting)
    return out
