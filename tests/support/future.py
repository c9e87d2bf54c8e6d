"""Stand-ins for releases of transformers that do not exist yet: stock classes that are called in another way.

Each changes the classes of a tiny model's own modules, so that weights and answers are those of the stock model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from trio.core.upstream import DynamicCache, Role, cache_name, causal_mask, keywords


def _turn(module: Any, forward: Callable[..., Any]) -> None:
    """Gives a module another forward, through a class of its own."""
    module.__class__ = type(f"Future{type(module).__name__}", (type(module),), {"forward": forward})


def _stock_layer(layer: Any) -> Callable[..., Any]:
    """The layer's stock forward, called by role."""
    stock = type(layer).forward

    def run(self: Any, hidden: Any, mask: Any, rotary: Any, cache: Any) -> Any:
        given = keywords({Role.MASK: mask, Role.ROTARY: rotary, Role.CACHE: cache, Role.USE_CACHE: cache is not None})
        return stock(self, hidden, **given)

    return run


class Future:
    """A LLaVA whose language model calls its layers in the way that a subclass of this writes down."""

    def __init__(self, model: Any) -> None:
        self.model = model
        text = model.model.language_model
        for layer in text.layers:
            layer.parent = [text]  # a list, so that it is no submodule
            _turn(layer, self.layer_forward(_stock_layer(layer)))
        _turn(text, self.text_forward())
        _turn(model.model, self.multimodal_forward())

    def multimodal_forward(self) -> Callable[..., Any]:
        call_text = self.call_text

        def forward(
            self: Any,
            input_ids: Any = None,
            pixel_values: Any = None,
            attention_mask: Any = None,
            position_ids: Any = None,
            cache: Any = None,
            inputs_embeds: Any = None,
            mm_encoder_outputs: Any = None,
            **kwargs: Any,
        ) -> Any:
            cache = kwargs.pop("past_key_values", cache)
            embeds = self.get_input_embeddings()(input_ids)
            encoded = (mm_encoder_outputs or {}).get("image")
            if encoded is None and pixel_values is not None:
                encoded = self.get_image_features(pixel_values=pixel_values, return_dict=True)
            if encoded is not None:
                features = torch.cat(list(encoded.pooler_output)).to(embeds.dtype)
                where = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
                embeds = embeds.masked_scatter(where, features)
            for name in ("logits_to_keep", "return_dict", "output_attentions", "output_hidden_states"):
                kwargs.pop(name, None)
            out = call_text(self.language_model, embeds, attention_mask, position_ids, cache, kwargs)
            hidden, cache = out if isinstance(out, tuple) else (out.last_hidden_state, out[cache_name()])
            return LlavaModelOutputWithPast(last_hidden_state=hidden, **{cache_name(): cache})

        return forward

    def call_text(self, text: Any, embeds: Any, mask: Any, positions: Any, cache: Any, kwargs: Any) -> Any:
        return text(
            **keywords({Role.EMBEDDINGS: embeds, Role.MASK: mask, Role.POSITIONS: positions, Role.CACHE: cache})
        )

    def text_forward(self) -> Callable[..., Any]:
        run = self.run_text

        def forward(
            self: Any,
            inputs_embeds: Any,
            attention_mask: Any,
            position_ids: Any,
            cache: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return run(self, inputs_embeds, attention_mask, position_ids, cache, use_cache)

        def older(
            self: Any,
            inputs_embeds: Any,
            attention_mask: Any,
            position_ids: Any,
            past_key_values: Any = None,
            use_cache: Any = None,
        ) -> Any:
            return run(self, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)

        return forward if cache_name() == "cache" else older

    def run_text(self, text: Any, embeds: Any, mask: Any, positions: Any, cache: Any, use_cache: Any) -> Any:
        if cache is None and use_cache is not False:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = (torch.arange(embeds.shape[1]) + past)[None]
        valid = None if mask is None else mask.bool()
        causal = causal_mask(text.config, embeds, valid, past=past, layer=0)
        hidden, rotary = embeds, text.rotary_emb(embeds, positions)
        for layer in text.layers:
            hidden = self.call_layer(layer, hidden, causal, positions, rotary, cache)
        return self.text_output(text.norm(hidden), cache)

    def text_output(self, hidden: Any, cache: Any) -> Any:
        return _output(hidden, cache)

    def call_layer(self, layer: Any, hidden: Any, mask: Any, positions: Any, rotary: Any, cache: Any) -> Any:
        given = {Role.MASK: mask, Role.POSITIONS: positions, Role.ROTARY: rotary, Role.CACHE: cache}
        return layer(hidden, **keywords(given))

    def layer_forward(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        if cache_name() == "cache":

            def forward(
                self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None, cache=None
            ):
                return stock(self, hidden_states, attention_mask, position_embeddings, cache)

        else:

            def forward(
                self,
                hidden_states,
                attention_mask=None,
                position_ids=None,
                position_embeddings=None,
                past_key_values=None,
            ):
                return stock(self, hidden_states, attention_mask, position_embeddings, past_key_values)

        return forward


def _output(hidden: Any, cache: Any) -> Any:
    return BaseModelOutputWithPast(last_hidden_state=hidden, **{cache_name(): cache})


class CacheRenamedInLayers(Future):
    """Layers take the cache as `kv_state`."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return layer(hidden, attention_mask=mask, position_embeddings=rotary, kv_state=cache)

    def layer_forward(self, stock):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, kv_state: DynamicCache = None):
            return stock(self, hidden_states, attention_mask, position_embeddings, kv_state)

        return forward


class CacheInKeywords(CacheRenamedInLayers):
    """Layers take the cache as `kv_state` among further keywords, which no signature shows."""

    def layer_forward(self, stock):
        def forward(self, hidden_states, **kwargs):
            return stock(
                self, hidden_states, kwargs["attention_mask"], kwargs["position_embeddings"], kwargs["kv_state"]
            )

        return forward


class CacheRenamedInLanguageModel(Future):
    """The language model takes the cache as `kv_state`."""

    def call_text(self, text, embeds, mask, positions, cache, kwargs):
        return text(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, kv_state=cache)

    def text_forward(self):
        run = self.run_text

        def forward(self, inputs_embeds, attention_mask, position_ids, kv_state=None, use_cache=None):
            return run(self, inputs_embeds, attention_mask, position_ids, kv_state, use_cache)

        return forward


class CacheInAnObject(Future):
    """Layers find the cache inside an object."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return layer(hidden, attention_mask=mask, position_embeddings=rotary, state=SimpleNamespace(cache=cache))

    def layer_forward(self, stock):
        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, state=None, **kwargs):
            return stock(self, hidden_states, attention_mask, position_embeddings, state.cache)

        return forward


class MaskRenamed(Future):
    """Layers take the mask as `bias`."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return layer(hidden, bias=mask, **keywords({Role.ROTARY: rotary, Role.CACHE: cache}))

    def layer_forward(self, stock):
        def forward(self, hidden_states, bias=None, position_embeddings=None, cache=None, past_key_values=None):
            return stock(self, hidden_states, bias, position_embeddings, past_key_values if cache is None else cache)

        return forward


class MaskInADict(Future):
    """Layers get one mask for each kind of layer."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return super().call_layer(layer, hidden, {"full_attention": mask}, positions, rotary, cache)

    def layer_forward(self, stock):
        return super().layer_forward(lambda self, h, mask, rotary, c: stock(self, h, mask["full_attention"], rotary, c))


class MaskInAnObject(Future):
    """Layers find the mask inside an object, among further keywords."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        layout = SimpleNamespace(mask=mask)
        return layer(hidden, layout=layout, **keywords({Role.ROTARY: rotary, Role.CACHE: cache}))

    def layer_forward(self, stock):
        def forward(self, hidden_states, **kwargs):
            cache = kwargs[cache_name()]
            return stock(self, hidden_states, kwargs["layout"].mask, kwargs["position_embeddings"], cache)

        return forward


class RotaryInside(Future):
    """Layers compute rotary embeddings themselves."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return layer(hidden, **keywords({Role.MASK: mask, Role.POSITIONS: positions, Role.CACHE: cache}))

    def layer_forward(self, stock):
        def forward(
            self, hidden_states, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **kwargs
        ):
            rotary = self.parent[0].rotary_emb(hidden_states, position_ids)
            return stock(self, hidden_states, attention_mask, rotary, past_key_values if cache is None else cache)

        return forward


class RotaryInsideStrict(RotaryInside):
    """Likewise, and a layer takes nothing else."""

    def layer_forward(self, stock):
        inner = super().layer_forward(stock)

        def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, past_key_values=None):
            return inner(self, hidden_states, attention_mask, position_ids, cache, past_key_values)

        return forward


class TupleOutput(Future):
    """The language model gives a tuple."""

    def text_output(self, hidden, cache):
        return hidden, cache


class HiddenRenamed(Future):
    """Layers take the hidden states as `states`."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        return layer(states=hidden, **keywords({Role.MASK: mask, Role.ROTARY: rotary, Role.CACHE: cache}))

    def layer_forward(self, stock):
        def forward(self, states, attention_mask=None, position_embeddings=None, cache=None, past_key_values=None):
            cache = past_key_values if cache is None else cache
            return stock(self, states, attention_mask, position_embeddings, cache)

        return forward


class LayersBypassed(Future):
    """Layers are run by their `forward`, past all hooks."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        given = {Role.MASK: mask, Role.POSITIONS: positions, Role.ROTARY: rotary, Role.CACHE: cache}
        return layer.forward(hidden, **keywords(given))


class TextBypassed(Future):
    """The language model is run by its `forward`, past all hooks."""

    def call_text(self, text, embeds, mask, positions, cache, kwargs):
        return text.forward(
            **keywords({Role.EMBEDDINGS: embeds, Role.MASK: mask, Role.POSITIONS: positions, Role.CACHE: cache})
        )


class CopiedCache(Future):
    """Layers get a view of the cache that is another object; it shares the layers."""

    def call_layer(self, layer, hidden, mask, positions, rotary, cache):
        view = copy.copy(cache)
        return super().call_layer(layer, hidden, mask, positions, rotary, view)


class EncodedAhead(Future):
    """What `generate` had encoded comes as `media`."""

    def multimodal_forward(self):
        inner = super().multimodal_forward()

        def forward(self, input_ids=None, pixel_values=None, attention_mask=None, media=None, **kwargs):
            given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
            kwargs.pop("mm_encoder_outputs", None)
            return inner(self, **given, mm_encoder_outputs=media, **kwargs)

        return forward

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        top = type(model).forward

        def forward(self, input_ids=None, pixel_values=None, attention_mask=None, mm_encoder_outputs=None, **kwargs):
            return top(self, input_ids, pixel_values, attention_mask, media=mm_encoder_outputs, **kwargs)

        _turn(model, forward)


class KeysElsewhere(Future):
    """Every other layer puts its keys into a cache of its own."""

    def layer_forward(self, stock):
        def aside(self: Any, hidden: Any, mask: Any, rotary: Any, cache: Any) -> Any:
            number = self.self_attn.layer_idx
            if cache is None or number % 2 == 0:
                return stock(self, hidden, mask, rotary, cache)
            if cache.get_seq_length() == 0 or hidden.shape[1] > 1 or not hasattr(self, "own"):
                self.own = DynamicCache()
            while len(self.own.layers) < number:
                self.own.update(torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1), len(self.own.layers))
            return stock(self, hidden, mask, rotary, self.own)

        return super().layer_forward(aside)


STAND_INS = [
    CacheRenamedInLayers,
    CacheInKeywords,
    CacheRenamedInLanguageModel,
    CacheInAnObject,
    MaskRenamed,
    MaskInADict,
    MaskInAnObject,
    RotaryInside,
    RotaryInsideStrict,
    TupleOutput,
    HiddenRenamed,
    LayersBypassed,
    TextBypassed,
    CopiedCache,
    KeysElsewhere,
]
