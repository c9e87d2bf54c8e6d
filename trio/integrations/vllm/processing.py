"""The processor's part: a spec for each item, in its key, its fields and the length of its place in the prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from ...errors import InputError, UnsupportedModelError
from .settings import KEY, EngineSpec, ServedFamily, read_spec

#: The field of an item that carries its spec to the model: its text as bytes.
FIELD = "trio_spec"

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor as _Base
else:
    _Base = object


def spec_field(spec: EngineSpec) -> torch.Tensor:
    """A spec as uint8 ``(bytes,)``."""
    return torch.frombuffer(bytearray(spec.text.encode("utf-8")), dtype=torch.uint8)


def spec_of_field(field: torch.Tensor, family: ServedFamily) -> EngineSpec:
    """What `spec_field` wrote."""
    spec = read_spec(bytes(field.flatten().tolist()).decode("utf-8"), family)
    assert spec is not None  # only specs are written
    return spec


class SpecProcessor(_Base):  # type: ignore[misc]  # vLLM has no types where this is checked
    """Mixed into a processor of vLLM: reads, checks and passes on the specs of requests.

    Attributes:
        family: what is known of the model.
        pixels: the field that tells how many images of a call have pixels.
    """

    takes_specs: ClassVar[bool] = True
    pixels: ClassVar[str] = "pixel_values"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.info.get_hf_config()
        self.family = self.family_of(config, self.info.ctx.get_mm_config())
        self.default_spec = read_spec(getattr(config, KEY, None), self.family)

    @classmethod
    def family_of(cls, config: Any, multimodal: Any) -> ServedFamily:
        """What is known of a model before it is built.

        Args:
            config: of the model.
            multimodal: vLLM's settings for images.
        """
        raise NotImplementedError

    def tokens_left(self, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any, item: int, stock: int) -> int:
        """Tokens of an image's place in the prompt, newlines included.

        Args:
            spec: of the request.
            mm_items: the request's items.
            out_mm_kwargs: their fields.
            item: the image.
            stock: tokens of its place without a spec.
        """
        raise NotImplementedError

    def sizes(self, height: int, width: int) -> list[int]:
        """Visual tokens of each input of the tower, of an image of so many pixels, before any is dropped."""
        raise NotImplementedError

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Replaces the request's spec, or the engine's, by the one form of it that keys are made of.

        Raises:
            TrioError: the spec is wrong, or cannot work here.
        """
        options = dict(inputs.hf_processor_mm_kwargs)
        asked = KEY in options
        source = options.pop(KEY, None)
        spec = read_spec(source, self.family) if asked else self.default_spec
        if spec is not None and asked and _has_embeddings(inputs.mm_data_items):
            raise InputError(
                f"{KEY}: found a spec and image embeddings; embeddings are not compressed again. Give images, or leave "
                f"{KEY!r} out of mm_processor_kwargs"
            )
        if spec is not None:
            options[KEY] = spec.text
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def get_dummy_inputs(self, seq_len: Any, mm_counts: Any, mm_options: Any) -> Any:
        """Whole images: a request may ask for them, and memory is measured with what is largest."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: None})

    def _call_hf_processor(self, hf_data: Any, hf_kwargs: Any) -> Any:
        return super()._call_hf_processor(hf_data, _without(hf_kwargs))

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any) -> Any:
        data = super()._postprocess_hf_mm_data(mm_inputs, _without(hf_processor_mm_kwargs), processed_data)
        spec = self._spec(hf_processor_mm_kwargs)
        images = self._images(data)
        if spec is not None and images:
            data[FIELD] = [spec_field(spec)] * images
        return data

    def _images(self, data: Any) -> int:
        """How many images of a call have pixels."""
        return len(data[self.pixels]) if self.pixels in data else 0

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs)))
        if FIELD in hf_inputs:
            fields[FIELD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates: Sequence[Any] = super()._get_prompt_updates(mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs)
        spec = self._spec(hf_processor_mm_kwargs)
        if spec is None:
            return updates
        return [
            self._shortened(update, spec, mm_items, out_mm_kwargs) if update.modality == "image" else update
            for update in updates
        ]

    def _shortened(self, update: Any, spec: EngineSpec, mm_items: Any, out_mm_kwargs: Any) -> Any:
        if not isinstance(update, PromptReplacement) or not callable(update.replacement):
            raise UnsupportedModelError(f"{KEY}: found {type(update).__name__} where images are replaced by tokens")
        stock = update.replacement

        def replacement(item: int) -> Any:
            tokens = stock(item)
            if _has_embeddings(mm_items):
                return tokens
            return tokens[: self.tokens_left(spec, mm_items, out_mm_kwargs, item, len(tokens))]

        return dataclasses.replace(update, replacement=replacement)

    def _spec(self, options: Mapping[str, Any]) -> EngineSpec | None:
        return read_spec(options.get(KEY), self.family)


def _has_embeddings(mm_items: Any) -> bool:
    return isinstance(mm_items.get("image"), ImageEmbeddingItems)


def _without(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != KEY}
