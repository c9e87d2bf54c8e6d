"""The one way of values from the host to a device, for which the host does not wait; and what it looks at once."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import accumulate

import torch
from torch.utils.weak import WeakIdKeyDictionary


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


def upload_all(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of several types and shapes on a device, in one copy where all come from the CPU; see `upload`."""
    if device.type == "cpu" or any(value.device.type != "cpu" for value in values):
        return [upload(value, device) for value in values]
    # The widest first: each begins where a number of its type may begin.
    order = sorted(range(len(values)), key=lambda n: -values[n].element_size())
    raw = [values[n].contiguous().flatten().view(torch.uint8) for n in order]
    flat, moved = upload(torch.cat(raw), device), list(values)
    for n, part, end in zip(order, raw, accumulate(map(len, raw)), strict=True):
        moved[n] = flat[end - len(part) : end].view(values[n].dtype).view(values[n].shape)
    return moved


class HostValues:
    """Whole numbers of a device at which the host has looked: a second look at the same tensor costs nothing.

    It is for tensors that are given and never written to: ids, masks, grids of images.
    """

    def __init__(self) -> None:
        """Nothing has been looked at."""
        self._known: MutableMapping[torch.Tensor, torch.Tensor] = WeakIdKeyDictionary()

    def look(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of whole numbers on the CPU, int64; those that are not known yet in one copy."""
        wanted = [tensor for tensor in tensors if tensor.device.type != "cpu" and tensor not in self._known]
        if wanted:
            device = wanted[0].device
            flat = [tensor.to(device, torch.int64).flatten() for tensor in wanted]
            host = (flat[0] if len(flat) == 1 else torch.cat(flat)).cpu()
            for tensor, part in zip(wanted, torch.split(host, [len(one) for one in flat]), strict=True):
                self._known[tensor] = part.view(tensor.shape)
        return [tensor.to(torch.int64) if tensor.device.type == "cpu" else self._known[tensor] for tensor in tensors]
