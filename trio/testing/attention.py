"""Whole attention matrices of a module that runs, as its own operations make them: the reference for `check_tower`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WholeAttention(TorchDispatchMode):
    """Records every attention matrix that is computed inside, whatever computes it.

    Fused kernels are recorded by what they compute from their arguments, eager attention by its softmax. This holds all
    matrices at once: it is for tiny modules on a CPU.
    """

    def __init__(self) -> None:
        """Nothing recorded yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.matrices: list[torch.Tensor] = []

    def __enter__(self) -> WholeAttention:
        # torch's fused nn.MultiheadAttention shows neither its softmax nor its scores.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and records it where it is attention."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            queries, keys = args[0].float(), args[1].float()
            bias = kwargs.get("attn_mask", kwargs.get("attn_bias"))
            if bias is None and "flash" not in name and len(args) > 3:
                bias = args[3]
            scale = kwargs.get("scale") or queries.shape[-1] ** -0.5
            scores = queries @ keys.transpose(-1, -2) * scale
            self.matrices.append((scores if bias is None else scores + bias).softmax(-1))
        elif name in ("_softmax", "_safe_softmax") and out.ndim >= 3:
            self.matrices.append(out.float())
        return out
