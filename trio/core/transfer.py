"""The one way of values from the host to a device: the host does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(
    values: torch.Tensor | Sequence[int] | Sequence[float] | Sequence[bool],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Values on a device, without waiting for what the device still has to do.

    A plain copy from pageable memory to a CUDA device waits for the device. This one goes through pinned memory, which
    torch keeps until the copy is done, and returns at once.

    Args:
        values: a tensor on the CPU, or numbers. A tensor on another device is moved, and the CPU waits for its values.
        device: where they go.
        dtype: of the result; that of the values if not given. They are converted on the host, before the copy.

    Returns:
        A tensor in the shape of the values; the tensor itself where it is on the device already and of that type.
    """
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if host.device.type != "cpu" or device.type == "cpu":
        return host.to(device, dtype)
    host = host if dtype is None else host.to(dtype)
    # Only CUDA (and ROCm, which torch calls by the same name) is known to copy from pinned memory; without a driver
    # `pin_memory` raises, and then no tensor can go to such a device either.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
