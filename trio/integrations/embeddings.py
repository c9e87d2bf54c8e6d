"""Compressed image embeddings for engines that take them in place of images, as stock vLLM does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import adapter_for
from ..core.images import inputs_for
from ..errors import InputError, UnsupportedModelError
from ..pipeline import Pipeline
from ..spec import PipelineSpec
from .vllm.settings import ServedFamily, written_spec

#: Adapters whose models an engine numbers without gaps, so that embeddings alone say everything.
ADAPTERS = ("llava", "llava-next")


class _Stop(Exception):
    """Ends a forward in front of the first decoder layer."""


def export_embeddings(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    spec: str | Path | Mapping[str, Any] | PipelineSpec,
) -> list[torch.Tensor]:
    """What the language model gets of images under a spec: `image_embeds` for an engine that takes them.

    The pipeline of the spec runs on each image alone, up to the first decoder layer; any compressor works.

    Args:
        model: a LLaVA-1.5 or LLaVA-NeXT of transformers, in evaluation mode.
        processor: its own.
        images: RGB images.
        spec: a compressor's name with a count (``"divprune-64"``), or what `load_spec` takes; without stages, and with
            positions ``compact`` or ``auto``.

    Returns:
        For each image ``(tokens, width)`` on the CPU, newlines included, in the model's dtype.

    Raises:
        UnsupportedModelError: the model is of another family, or the spec cannot be decided in front of it.
        TrioError: the spec is wrong.
    """
    adapter = adapter_for(model)
    names = type(model).__name__
    tiled = bool(adapter.whole_beside_tiles)
    loaded = written_spec(spec, ServedFamily(names, "compact", "", has_newlines=tiled))
    if not loaded.engine_ready:
        raise UnsupportedModelError(f"export: spec {loaded.name!r}: {loaded.engine_ready.reason}.")
    pipeline = Pipeline.from_spec(loaded, model, adapter=adapter)
    if pipeline.adapter_name not in ADAPTERS:
        raise UnsupportedModelError(
            f"export: found {names} (adapter {pipeline.adapter_name!r}); embeddings alone are enough for models whose "
            f"positions are plain numbers: {', '.join(ADAPTERS)}. For Qwen-VL use the plugin (docs/vllm.md)."
        )
    if pipeline.positions != "compact":
        raise UnsupportedModelError(
            "export: positions: found 'original'; an engine numbers embeddings without gaps. Write positions: compact."
        )
    with pipeline:
        return [_embedded(pipeline, processor, image) for image in images]


def _embedded(pipeline: Pipeline, processor: Any, image: Any) -> torch.Tensor:
    adapter = pipeline.adapter
    inputs = inputs_for(processor, [image], "?").to(next(adapter.model.parameters()).device)
    pixels = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    dtype = adapter.language_model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    inputs.update({name: value.to(dtype) for name, value in pixels.items()})
    entering: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs[name]
        entering.append(hidden.detach())
        raise _Stop

    name = adapter.upstream.layers[0].hidden
    handle = adapter.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            adapter.model(**inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    ids = inputs["input_ids"][0].cpu()
    config: Any = adapter.model.config
    places = (ids == config.image_token_id).nonzero().squeeze(1)
    if not len(places) or not torch.equal(places, torch.arange(int(places[0]), int(places[-1]) + 1)):
        raise InputError("export: the processor does not put an image's tokens in one row; use the plugin instead")
    behind = len(ids) - 1 - int(places[-1])
    hidden = entering[0][0]
    return hidden[int(places[0]) : len(hidden) - behind].cpu().contiguous()


__all__ = ["export_embeddings"]
