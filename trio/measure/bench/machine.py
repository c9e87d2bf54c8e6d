"""The machine: what it is, how many FLOPs and bytes a second it reaches, and how much memory a call takes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core.record import Record

__all__ = ["Machine", "describe", "peak_bytes", "wait"]

_SIDE = 2048
_COPIED = 1 << 28
_REPEATS = 5
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Machine(Record):
    """Where the measurement ran.

    Attributes:
        device: type and name of what ran the model.
        threads: of torch on the host.
        load: processes that wanted to run when the measurement began, None where that is not known. Above `threads`
            means that others ran beside it.
        flops_per_second: what a large matrix product reaches in the dtype of the measurement.
        bytes_per_second: what copying in memory reaches, read and written bytes together.
        versions: of Python, torch and transformers.
    """

    device: str
    threads: int
    load: float | None
    flops_per_second: float
    bytes_per_second: float
    versions: dict[str, str]


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def describe(device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine, measured with a matrix product and a copy (a second or two)."""
    import transformers

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    left, right = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    product = _fastest(lambda: left @ right, device)
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = _fastest(lambda: target.copy_(source), device)
    return Machine(
        device=f"{device.type}: {_name(device)}",
        threads=torch.get_num_threads(),
        load=load,
        flops_per_second=2 * _SIDE**3 / product,
        bytes_per_second=2 * _COPIED / copying,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        },
    )


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """By how many bytes a call's memory grows at its peak; None where the machine does not say.

    On CUDA what torch allocates; on a processor under Linux the growth of the resident set, to a page.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        _CLEAR.write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        work()
        return max(0, _resident("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    taken = []
    for _ in range(_REPEATS):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
