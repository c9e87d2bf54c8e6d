"""Weights that are quantised: how they are, and which kinds let gradients through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core import upstream

__all__ = ["WORKING", "advice", "kind_of"]

#: Kinds whose layers give gradients, as ``make quantised`` found it.
WORKING = ("torchao int8 weight-only", "bitsandbytes nf4", "bitsandbytes int8")
#: bitsandbytes packs 4-bit weights anew at the first call on CPUs with AVX512-BF16, for a kernel without a backward.
_PACKED = (
    "(on a CPU with AVX512-BF16 set `support_avx512bf16_for_cpu` of its linear layers to False before they are used)"
)


def kind_of(model: nn.Module, layer: nn.Module) -> str:
    """How the weights of a decoder layer are quantised; empty where nothing says that they are.

    The model's configuration says it, or the classes of the weights: integers, and tensors that stand for others.

    Args:
        model: the whole model.
        layer: one of its decoder layers.
    """
    config: Any = getattr(model, "config", None)
    tensors = [*layer.parameters(), *layer.buffers()]
    others = {type(one).__name__ for one in tensors} - {"Tensor", "Parameter", "Buffer"}
    integers = {str(one.dtype).removeprefix("torch.") for one in tensors if _counts(one)}
    names = [upstream.quantisation(config), *sorted(others | integers)]
    return ", ".join(name for name in names if name)


def advice(kind: str, *, as_they_come: bool) -> str:
    """What to say where no gradient comes through such a layer.

    Args:
        kind: as of `kind_of`.
        as_they_come: whether the layer's projections are not linear, as where activations are quantised, too.
    """
    what = "its activations are quantised as they come, as in dynamic-activation int8" if as_they_come else "quantised"
    packed = f" {_PACKED}" if "4bit" in kind.casefold() else ""
    return f"{what} ({kind}). Kinds of quantisation that give gradients: {', '.join(WORKING)}{packed}"


def _counts(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds integers of 8 bits, as packed weights do."""
    return tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 0
