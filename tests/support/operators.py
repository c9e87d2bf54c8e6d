"""Operators on the meta device, which stands for an accelerator: launches, copies to and from the host, the largest."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Operators(TorchDispatchMode):
    """Counts what would run on the accelerator; looks at counts are answered by ones, looks at indices by zeros.

    Attributes:
        launches: operators that are not views, copies included.
        downloads: copies to the host and other looks at values.
        largest: bytes of the largest tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.downloads = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        if not any(one.is_meta for one in given) and kwargs.get("device") != META:
            return func(*args, **kwargs)
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        self.launches += alias is None or alias.is_write
        if func is torch.ops.aten._local_scalar_dense.default:
            self.downloads += 1
            return 1
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.downloads += 1
            (own,) = given
            return torch.full(own.shape, int(own.ndim == 1), dtype=kwargs.get("dtype") or own.dtype)
        out = func(*args, **kwargs)
        if alias is None:
            sizes = [one.numel() * one.element_size() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
            self.largest = max([self.largest, *sizes])
        return out
