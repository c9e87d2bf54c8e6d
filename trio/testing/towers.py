"""`check_tower`: what every kind of vision tower must give readers, compared with the attention that it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core.tokens import Signal
from ..encoders.reading.reader import Reader, Reading
from ..encoders.towers import Heads, Layout, Tower, tower_for
from ..encoders.towers.base import hidden_of
from ..errors import UnsupportedModelError
from .attention import WholeAttention
from .results import Case, CheckResults, require, run_cases

Images = torch.Tensor | Mapping[str, Any]
TOLERANCE = 1e-5


def check_tower(tower: nn.Module | Tower, images: Images, *, raise_on_failure: bool = True) -> CheckResults:
    """Checks a kind of tower on a module of it: signals, order, hooks, batches, merging.

    Args:
        tower: a tiny module in float32 on the CPU (a few blocks, a few dozen patches, random weights), or a `Tower`
            bound to one.
        images: two images or more, as `Tower.run` takes them.
        raise_on_failure: whether to raise where a check does not hold.

    Returns:
        Every check with its numbers.

    Raises:
        AssertionError: a check does not hold.
        UnsupportedModelError: no registered tower takes the module.
    """
    instance = tower_for(tower)
    results = CheckResults(
        f"tower {type(instance).__name__}", tuple(run_cases("tower", _Suite(instance, images).cases()))
    )
    return results.raise_if_failed() if raise_on_failure else results


class _Suite:
    def __init__(self, tower: Tower, images: Images) -> None:
        self.tower = tower
        self.images = images
        self.depth = len(tower.blocks)
        kinds = [kind for kind in ("attention", "keys", "hidden", "cls") if kind in tower.offers()]
        self.signals = [
            Signal(kind, block)
            for block in range(self.depth)
            for kind in kinds
            if kind in ("hidden", "cls") or tower.seeing_block(block) == block
        ]

    def cases(self) -> Iterator[Case]:
        yield "the module is found again", self._found
        yield "grids", self._grids
        for block in range(self.depth):
            if self.tower.seeing_block(block) == block:
                yield f"attention of block {block}", partial(self._attention, block)
        yield "hidden states and class token", self._hidden
        yield "reading changes nothing and leaves no trace", self._trace
        yield "a batch reads as its images", self._batch
        yield "torch.inference_mode", self._inference
        yield "blocks that do not exist", self._refusals
        if "groups" in self.tower.offers():
            yield "nothing to merge: nothing changes", self._merges_nothing
            yield "merged: a row for each patch, equal in a group", self._merges
            if self.depth > 1:
                yield "attention counts merged tokens with their sizes", self._sizes

    def _run(self, images: Images | None = None) -> torch.Tensor:
        with torch.no_grad():
            return _first(self.tower.run(self.images if images is None else images))

    def _read(self, images: Images | None = None) -> Reading:
        with Reader(self.tower, self.signals) as reader:
            self._run(images)
            return reader.take()

    def _found(self) -> str:
        again = tower_for(self.tower.module)
        require(type(again) is type(self.tower), f"tower_for gave a {type(again).__name__}; is the class registered?")
        return f"{self.depth} blocks, {'a' if self.tower.has_cls else 'no'} class token, prefix {self.tower.prefix}"

    def _grids(self) -> str:
        grids, inputs = self.tower.grids(self.images), self._read().inputs
        counts = tuple(rows * columns for rows, columns in grids)
        require(counts == inputs, f"grids {grids} do not have the {inputs} patches that were read")
        require(len(inputs) > 1, "give at least two images")
        return f"{len(grids)} inputs: {', '.join(f'{rows} x {columns}' for rows, columns in grids)}"

    def _attention(self, block: int) -> str:
        watch = WholeAttention()
        heads: list[Heads] = []
        layouts: list[Layout] = []
        attention = self.tower.attention(block)
        handles = [
            *self.tower.listen_layout(layouts.append),
            *self.tower.listen(block, heads.append),
            attention.register_forward_pre_hook(lambda *_: watch.matrices.clear()),
            attention.register_forward_hook(lambda *_: whole.extend(watch.matrices)),
        ]
        whole: list[torch.Tensor] = []
        try:
            with watch:
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        require(
            len(heads) == 1 and len(layouts) == 1, f"told {len(heads)} times of queries, {len(layouts)} of a layout"
        )
        require(bool(whole), "the attention module computed no softmax: is it the right module?")
        expected = _signal(whole, layouts[0], self.tower)
        reading = self._read()
        error = _difference(reading.values[Signal("attention", block)], expected)
        require(error <= TOLERANCE, f"attention differs by {error:.1e} from the mean of the whole matrices")
        return f"within {error:.1e} of {len(whole)} whole matrices of {tuple(whole[0].shape)}"

    def _hidden(self) -> str:
        outputs: list[torch.Tensor] = []
        layouts: list[Layout] = []
        handles = self.tower.listen_layout(layouts.append)
        for block in self.tower.blocks:
            handles.append(block.register_forward_hook(lambda m, args, out: outputs.append(hidden_of(out))))
        try:
            reading = self._read()
        finally:
            for handle in handles:
                handle.remove()
        for signal, value in reading.values.items():
            rows = outputs[signal.layer].flatten(0, -2)
            if signal.kind == "hidden":
                require(torch.equal(value, layouts[0].patches(rows)), f"{signal}: not the rows of the block's output")
            elif signal.kind == "cls":
                require(torch.equal(value, layouts[0].first_rows(rows)), f"{signal}: not each input's first row")
            elif signal.kind == "keys":
                require(value.ndim == 3 and len(value) == sum(reading.inputs), f"{signal}: shape {tuple(value.shape)}")
                require(value.dtype == torch.float32, f"{signal}: {value.dtype}, expected float32")
        return f"{len(outputs)} blocks"

    def _trace(self) -> str:
        def state() -> list[Any]:
            return [
                (path, sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
                for path, part in self.tower.module.named_modules()
            ]

        before, clean = self._run(), state()
        with Reader(self.tower, self.signals):
            require(torch.equal(self._run(), before), "reading changed what the tower gives")
        require(state() == clean, "hooks or attributes are left on the module")
        require(torch.equal(self._run(), before), "after reading, the tower gives something else")
        return f"{len(clean)} modules"

    def _batch(self) -> str:
        together, worst = self._read(), 0.0
        alone = [self._read(one) for one in _singles(self.images)]
        require(together.inputs == tuple(n for one in alone for n in one.inputs), "other numbers of patches alone")
        for signal, value in together.values.items():
            worst = max(worst, _difference(value, torch.cat([one.values[signal] for one in alone])))
        require(worst <= 1e-4, f"signals of an image differ by {worst:.1e} in a batch")
        return f"{len(alone)} images, within {worst:.1e}"

    def _inference(self) -> str:
        expected = self._read()
        with torch.inference_mode():
            reading = self._read()
        same = all(torch.equal(reading.values[one], expected.values[one]) for one in self.signals)
        require(same, "other signals under torch.inference_mode")
        return f"{len(self.signals)} signals"

    def _refusals(self) -> str:
        for block in (self.depth, -self.depth - 1):
            try:
                Reader(self.tower, [Signal("hidden", block)])
            except UnsupportedModelError:
                continue
            require(False, f"block {block} of {self.depth} was not refused")
        return f"{self.depth}, {-self.depth - 1}"

    def _merges_nothing(self) -> str:
        before = self._run()
        with Reader(self.tower, [Signal("groups", -1)], keep=lambda patches: patches):
            require(torch.equal(self._run(), before), "with all tokens kept, the tower gives something else")
        return "bitwise"

    def _merges(self) -> str:
        before = self._run()
        last = self.depth - 1
        signals = [Signal("groups", last), Signal("hidden", last)]
        with Reader(self.tower, signals, keep=lambda patches: max(1, patches * 2 // 3)) as reader:
            after = self._run()
            reading = reader.take()
        require(after.shape == before.shape, f"the tower gives {tuple(after.shape)}, without {tuple(before.shape)}")
        groups, rows = (reading.values[signal] for signal in signals)
        counts, first = [], 0
        for patches in reading.inputs:
            own, hidden = groups[first : first + patches], rows[first : first + patches]
            require(torch.equal(hidden, hidden[own]), "tokens of one group differ")
            counts.append(len(set(own.tolist())))
            expected = max(1, patches * 2 // 3)
            require(counts[-1] == expected, f"{counts[-1]} groups of {patches} patches, expected {expected}")
            first += patches
        return f"{counts} groups of {list(reading.inputs)} patches"

    def _sizes(self) -> str:
        """Copies of a token count by themselves: a block on all rows is the reference for one on merged tokens."""
        outputs: list[torch.Tensor] = []
        handle = self.tower.attention(1).register_forward_hook(lambda m, args, out: outputs.append(hidden_of(out)))
        try:
            merges = max(1, min(self._read().inputs) // 3)
            outputs.clear()
            for last in (0, 1):
                with Reader(self.tower, [Signal("groups", last, merges=merges)]):
                    self._run()
        finally:
            handle.remove()
        copies, merged = outputs[0], outputs[-1]
        require(merged.shape[1] < copies.shape[1], f"block 1 ran on {merged.shape[1]} rows of {copies.shape[1]}")
        distances = torch.cdist(merged.float(), copies.float(), compute_mode="donot_use_mm_for_euclid_dist")
        error = float(distances.amin(2).max()) / max(1.0, float(copies.abs().max()))
        require(error <= 1e-4, f"attention on merged tokens differs by {error:.1e}")
        return f"{merged.shape[1]} of {copies.shape[1]} rows, within {error:.1e}"


def _signal(whole: list[torch.Tensor], layout: Layout, tower: Tower) -> torch.Tensor:
    """Attention of every patch from whole matrices: one for all inputs, or one for each."""
    matrices = [m for matrix in whole for m in matrix.reshape(-1, *matrix.shape[-3:])]  # (heads, Q, S) each
    if len(matrices) == 1 and len(layout.spans) > 1:  # nn.MultiheadAttention folds inputs into heads
        matrices = list(matrices[0].unflatten(0, (len(layout.spans), -1)))
    require(len(matrices) == len(layout.spans), f"{len(matrices)} matrices for {len(layout.spans)} inputs")
    rows = []
    for matrix, (start, stop) in zip(matrices, layout.spans, strict=True):
        real = matrix[:, : stop - start, : stop - start].mean(0)
        rows.append((real[0] if tower.has_cls else real.mean(0))[layout.prefix :])
    values = torch.cat(rows)
    return values if layout.order is None else values[layout.order]


def _first(output: Any) -> torch.Tensor:
    """The first tensor of what a tower gives."""
    if isinstance(output, torch.Tensor):
        return output
    tensor: torch.Tensor = output[0]
    return tensor


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    require(actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    scale = max(1.0, float(expected.abs().max()))
    return float((actual.float() - expected.float()).abs().max()) / scale


def _singles(images: Images) -> list[Images]:
    """The images one by one."""
    if isinstance(images, torch.Tensor):
        return [image[None] for image in images]
    if "grid_thw" not in images:
        count = len(next(iter(images.values())))
        return [{name: value[i : i + 1] for name, value in images.items()} for i in range(count)]
    grids, first = images["grid_thw"], 0
    singles: list[Images] = []
    for grid, patches in zip(grids, grids.prod(1).tolist(), strict=True):
        singles.append({"pixel_values": images["pixel_values"][first : first + patches], "grid_thw": grid[None]})
        first += patches
    return singles
