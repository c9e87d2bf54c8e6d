"""Copies from the host to a device: pinned and not waiting where there is an accelerator, plain elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trio.core.tokens import NEWLINE, ImageTokens
from trio.core.transfer import HostValues, upload, upload_all
from trio.runtime.state import TokenState, drop, start
from trio.testing.launches import count

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))


@pytest.fixture
def accelerator(monkeypatch):
    """A stand-in for a CUDA device: what is pinned is marked, what is copied is noted and comes back as it is."""
    pinned, copies = [], []

    def pin_memory(tensor):
        assert tensor.device.type == "cpu", "only dense tensors of the CPU can be pinned"
        pinned.append(tensor.clone())
        return pinned[-1]

    stock = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if args[:1] != (CUDA,):
            return stock(tensor, *args, **kwargs)
        copies.append((any(tensor is one for one in pinned), kwargs.get("non_blocking", False)))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return copies


@pytest.mark.parametrize("values", [torch.tensor([3, 1, 2]), [3, 1, 2], (3, 1, 2)], ids=["tensor", "list", "tuple"])
def test_an_accelerator_is_given_pinned_memory_and_nobody_waits(accelerator, values):
    out = upload(values, CUDA)
    assert accelerator == [(True, True)]
    assert out.tolist() == [3, 1, 2]
    assert out.dtype == torch.int64


def test_values_are_converted_before_they_are_copied(accelerator):
    out = upload(torch.tensor([1.0, 2.0], dtype=torch.float64), CUDA, torch.float32)
    assert accelerator == [(True, True)]
    assert out.dtype == torch.float32


def test_the_host_keeps_its_tensors():
    values = torch.arange(4)
    assert upload(values, CPU) is values
    assert upload(values, CPU, torch.float32).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert upload([True, False], CPU).dtype == torch.bool
    assert upload([], CPU, torch.int64).dtype == torch.int64


def test_a_device_without_a_driver_is_not_given_pinned_memory():
    out = upload([1.0, 2.0], META, torch.float16)
    assert (out.device, out.dtype, tuple(out.shape)) == (META, torch.float16, (2,))


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.blocking.append(not (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_only_a_copy_from_the_host_may_be_overtaken():
    """Values that come from a device must be there when the CPU reads them."""
    with Copies() as copies:
        upload(torch.zeros(2), META)
        upload(torch.zeros(2, device=META), META, torch.float16)
    assert copies.blocking == [False, True]


def test_tensors_of_several_types_go_in_one_copy(accelerator):
    values = [
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.arange(3, dtype=torch.float32).expand(2, -1),
        torch.tensor([[True], [False]]),
    ]
    out = upload_all(values, CUDA)
    assert accelerator == [(True, True)]
    for one, moved in zip(values, out, strict=True):
        assert moved.dtype == one.dtype and torch.equal(moved, one)
    assert all(moved is one for one, moved in zip(values, upload_all(values, CPU), strict=True))


def tensors(state: TokenState) -> dict[str, torch.Tensor]:
    lines = state.newlines
    both = {**vars(state), **({} if lines is None else {f"newline {name}": v for name, v in vars(lines).items()})}
    return {name: value for name, value in both.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("newlines", [False, True])
def test_a_state_goes_in_one_copy_and_what_a_drop_leaves_as_it_is_only_once(accelerator, newlines):
    image = ImageTokens.from_grid(3, 4)
    if newlines:
        image = replace(image, kind=torch.where(image.column == 3, NEWLINE, image.kind))
    placeholders = torch.zeros(2, 20, dtype=torch.bool)
    placeholders[:, 3 : 3 + len(image.row)] = True
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :2] = False
    host, _ = start(placeholders, valid, ((image,), (image,)))
    there = host.to(CUDA)
    assert accelerator == [(True, True)]
    keep = torch.arange(host.most_at_start).expand(2, -1) % 4 == 0
    after, columns = drop(host, keep, ((3,), (3,)))
    moved = after.to(CUDA, there)
    assert accelerator == [(True, True)] * 2
    assert moved.ranks is there.ranks
    for one, other in ((host, there), (after, moved)):
        assert tensors(one).keys() == tensors(other).keys()
        assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())
        assert (one.counts, one.tail) == (other.counts, other.tail)
    assert after.tail == 20 - 3 - len(image.row) and columns.shape[1] == after.valid.shape[1]


def test_the_host_waits_once_for_what_it_looks_at():
    values, seen = HostValues(), []

    def call(ids, mask, grid):
        seen.append(values.look([ids, mask]))
        seen.append(values.look([mask, grid, ids]))
        seen.append(values.look([grid]))

    ids, mask, grid = torch.arange(6).view(2, 3), torch.tensor([[True, False]]), torch.tensor([[1, 4, 6]])
    assert count(call, {"ids": ids, "mask": mask, "grid": grid}).waits == 2
    assert [[one.tolist() for one in row] for row in seen] == [
        [ids.tolist(), [[1, 0]]],
        [[[1, 0]], grid.tolist(), ids.tolist()],
        [grid.tolist()],
    ]
