"""Copies from the host to a device: pinned and not waiting where there is an accelerator, plain elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trio.core.transfer import upload

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
