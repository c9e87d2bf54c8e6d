"""A model of true shape from a configuration, without a checkpoint: cheap to make, as slow to run as the real one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...adapters.find import adapter_for
from .architectures import Architecture

__all__ = ["build", "config_of"]

#: Numbers that weights are made of, repeated: drawing each would take longer than a prefill.
_BLOCK = 1 << 20
_SCALE = 0.02


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` makes tensors without memory; tables that are computed (rotary, window indices) stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


def config_of(architecture: Architecture, *, layers: int | None = None) -> Any:
    """The configuration of an architecture, see `Architecture.arguments`."""
    import transformers

    auto: Any = transformers.AutoConfig
    return auto.for_model(architecture.model_type, **architecture.arguments(layers))


def build(config: Any, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A model of that configuration with random weights, in evaluation mode.

    All decoder layers hold the same tensors: memory does not grow with the depth. A layer of a true-width model is
    larger than any processor's cache, so that its weights are read from memory in every layer all the same.

    Args:
        config: of the whole model.
        dtype: of the weights.
        device: where they are.
    """
    import transformers

    auto: Any = transformers.AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        torch.manual_seed(0)
        model: Any = auto.from_config(config, dtype=dtype)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(_SCALE).to(device, dtype)
    shared: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for layer in adapter_for(model).layers:
        for name, parameter in list(layer.named_parameters()):
            key = (name, parameter.shape)
            if key not in shared:
                shared[key] = _filled(parameter, block)
            _replace(layer, name, shared[key])
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            _replace(model, name, _filled(parameter, block))
    model.tie_weights()
    model = model.to(device).eval()
    model.requires_grad_(False)
    return model


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path).register_parameter(leaf, parameter)


def _filled(parameter: nn.Parameter, block: torch.Tensor) -> nn.Parameter:
    """Real numbers of the parameter's shape: its own where it has some, ones or zeros for norms, else the block's."""
    if not parameter.is_meta:
        return nn.Parameter(parameter.detach().to(block.device, block.dtype), requires_grad=False)
    made = torch.empty(parameter.shape, dtype=block.dtype, device=block.device)
    if parameter.ndim < 2:
        return nn.Parameter(made.fill_(1.0), requires_grad=False)
    flat = made.view(-1)
    for first in range(0, flat.numel(), block.numel()):
        part = flat[first : first + block.numel()]
        part.copy_(block[: part.numel()])
    return nn.Parameter(made, requires_grad=False)
