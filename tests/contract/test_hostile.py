"""What a hostile user found: caches cropped by halves, further arguments of layers, weights that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import IMAGE_TOKEN, inputs, llava

import trio
from trio.adapters import adapter_for
from trio.core.upstream import Role, cache_of, dynamic_cache, keywords
from trio.errors import CacheError, SpecError, UnsupportedModelError

pytestmark = pytest.mark.contract

STAGES = [trio.Stage(after_layer=1, keep="50%"), trio.Stage(after_layer=3, keep="25%")]
BATCH = inputs([[5, "image", 6, 7, 8]])
RAGGED = inputs([[5, "image", 6, 7], [8, "image", "image", 9, 10, 11], [12, 13, 14]])


# A spec or parts


@pytest.mark.parametrize(
    "parts",
    [
        {"stages": STAGES},
        {"compressor": "divprune"},
        {"positions": "compact"},
        {"newlines": "never"},
        {"budget": {"average": 3}},
        {"name": "mine"},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_spec_and_parts_are_refused(parts):
    with pytest.raises(SpecError, match="a spec and parts"):
        trio.Pipeline(llava(), spec=trio.load_spec("trio-soft-11"), **parts)


# Cropping


def lengths(cache):
    return [layer.keys.shape[-2] for layer in cache.layers]


def answered(model, batch, steps):
    with torch.no_grad():
        cache = cache_of(model(**batch, **keywords({Role.USE_CACHE: True})))
        for token in steps:
            ids = torch.tensor([[token]])
            model(**keywords({Role.IDS: ids, Role.CACHE: cache}))
    return cache


@pytest.mark.parametrize("first", [0, 1])
def test_a_refused_crop_leaves_every_layer_as_it_was(first):
    model = llava()
    stages = [trio.Stage(after_layer=first, keep="50%"), trio.Stage(after_layer=3, keep="25%")]
    with trio.Pipeline(model, stages=stages), torch.no_grad():
        cache = answered(model, BATCH, [9, 10, 11])
        before = lengths(cache)
        with pytest.raises(CacheError, match="only the last 3"):
            cache.crop(-10)
        assert lengths(cache) == before
        step = keywords({Role.IDS: torch.tensor([[12]])})
        twin = copy.deepcopy(cache)
        expected = model(**step, **keywords({Role.CACHE: answered(model, BATCH, [9, 10, 11])})).logits
        assert torch.equal(model(**step, **keywords({Role.CACHE: cache})).logits, expected)
        assert torch.equal(model(**step, **keywords({Role.CACHE: twin})).logits, expected)


def test_a_crop_that_fits_goes_back_by_that_many_tokens_in_every_layer():
    model = llava()
    with trio.Pipeline(model, stages=STAGES), torch.no_grad():
        cache, shorter = answered(model, BATCH, [9, 10, 11]), answered(model, BATCH, [9])
        twin = copy.deepcopy(cache)
        for one in (cache, twin):
            one.crop(-2)
            assert lengths(one) == lengths(shorter)
            step = {Role.IDS: torch.tensor([[12]])}
            ours = model(**keywords({**step, Role.CACHE: one})).logits
            theirs = model(**keywords({**step, Role.CACHE: copy.deepcopy(shorter)})).logits
            torch.testing.assert_close(ours, theirs)
        with pytest.raises(CacheError):
            twin.crop(-10)


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_cache_whose_layers_disagree_is_refused(layer):
    model = llava()
    with trio.Pipeline(model, stages=STAGES), torch.no_grad():
        cache = answered(model, BATCH, [9, 10, 11])
        cache.layers[layer].keys = cache.layers[layer].keys[..., :-1, :]
        cache.layers[layer].values = cache.layers[layer].values[..., :-1, :]
        with pytest.raises(CacheError, match=r"stands for|were planned"):
            model(**keywords({Role.IDS: torch.tensor([[12]]), Role.CACHE: cache}))


def test_a_cache_that_an_exception_left_half_filled_is_refused():
    model = llava()

    def raising(module, args):
        raise KeyboardInterrupt

    with trio.Pipeline(model, stages=STAGES) as pipeline, torch.no_grad():
        cache = dynamic_cache()
        handle = pipeline.adapter.layers[4].register_forward_pre_hook(raising)
        with pytest.raises(KeyboardInterrupt):
            model(**BATCH, **keywords({Role.CACHE: cache}))
        handle.remove()
        with pytest.raises(CacheError, match="stands for"):
            model(**keywords({Role.IDS: torch.tensor([[12]]), Role.CACHE: cache}))


# Further arguments of layers


def with_argument(model, make, use):
    """The language model gives its layers one more argument, and the layers use it."""
    text = model.model.language_model

    def hand_over(module, args, kwargs):
        held["value"] = make(kwargs)

    held = {}
    text.register_forward_pre_hook(hand_over, with_kwargs=True)
    for layer in text.layers:
        stock = type(layer).forward

        def forward(self, hidden_states, extra=None, stock=stock, **kwargs):
            return stock(self, use(hidden_states, extra), **kwargs)

        layer.__class__ = type("Extra", (type(layer),), {"forward": forward})
        call = layer.__class__.__call__

        def calling(self, *args, call=call, **kwargs):
            return call(self, *args, extra=held["value"], **kwargs)

        layer.__class__.__call__ = calling
    return model


def types_of(kwargs):
    """A number for each token: which half of the embedding's first feature it lies in."""
    return (kwargs["inputs_embeds"][..., 0] > 0).long()


def scaled(hidden, extra):
    assert extra.shape[:2] == hidden.shape[:2], "the argument does not fit the tokens"
    factor = 1 + extra.float().reshape(*hidden.shape[:2], -1).mean(-1, keepdim=True)
    return hidden * factor


@pytest.mark.parametrize(
    "make",
    [types_of, lambda k: types_of(k)[..., None].expand(-1, -1, 3), lambda k: types_of(k)[:1] * 0 + 1],
    ids=["(B, S)", "(B, S, 3)", "(1, S)"],
)
def test_an_argument_with_a_value_for_each_token_shrinks_with_the_tokens(make):
    def use(hidden, extra):  # as ERNIE-4.5-VL, which runs without it too
        return hidden if extra is None else scaled(hidden, extra.expand(hidden.shape[0], *extra.shape[1:]))

    model = with_argument(llava(), make, use)
    with trio.Pipeline(model, stages=STAGES) as pipeline, torch.no_grad():
        batch = model(**RAGGED).logits[:, -1]
        kept = pipeline.report.selection()
        out = model.generate(**RAGGED, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN])
        whole = {**RAGGED, "input_ids": out[:, :-1]}
        more = torch.ones(3, 2, dtype=torch.long)
        whole["attention_mask"] = torch.cat([RAGGED["attention_mask"], more], 1)
        with pipeline.replay(kept):
            again = model(**whole, use_cache=False).logits[:, -1]
        assert torch.equal(again.argmax(-1), out[:, -1])
    assert batch.isfinite().all()


def test_an_argument_of_which_nobody_knows_how_it_shrinks_is_refused():
    for make, says in [
        (lambda k: torch.zeros(k["inputs_embeds"].shape[1], k["inputs_embeds"].shape[1]), "extra"),
        (lambda k: torch.zeros(k["inputs_embeds"].shape[0] * k["inputs_embeds"].shape[1]), "extra"),
        (lambda k: {"types": types_of(k)}, "a dict"),
    ]:
        model = with_argument(llava(), make, lambda hidden, extra: hidden)
        with (
            trio.Pipeline(model, stages=STAGES),
            torch.no_grad(),
            pytest.raises(UnsupportedModelError, match=f"`extra`.*{says}|{says}"),
        ):
            model(**RAGGED)


def test_an_argument_that_has_nothing_to_do_with_tokens_is_left_alone():
    model = with_argument(
        llava(), lambda k: torch.tensor([2.0]), lambda hidden, extra: hidden * (2 if extra is None else extra)
    )
    with trio.Pipeline(model, stages=STAGES) as pipeline, torch.no_grad():
        assert model(**RAGGED).logits.isfinite().all()
    assert pipeline.report.retention < 1


# The true reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scorer", ["objective-gradient", "last-token-attention"])
def test_weights_that_are_not_finite_are_named_as_the_reason(value, scorer):
    model = llava()
    with torch.no_grad():
        for layer in model.model.language_model.layers[:2]:
            layer.mlp.down_proj.weight[0, 0] = value
    with pytest.raises(UnsupportedModelError, match="not finite: its weights hold nan or inf"):
        trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%", scorer={"name": scorer})])


def test_autocast_keeps_the_rows_of_the_probe():
    model = llava()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipeline = trio.Pipeline(model, stages=STAGES)
        assert pipeline.probe_notes() == []
        with pipeline, torch.no_grad():
            assert model(**BATCH).logits.isfinite().all()


def test_a_layer_that_computes_something_else_is_probed_whole_and_says_by_how_much():
    model = llava()
    layer = model.model.language_model.layers[1]
    stock = type(layer).forward

    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs) * 1.25

    layer.__class__ = type("Louder", (type(layer),), {"forward": forward})
    pipeline = trio.Pipeline(model, stages=STAGES)
    (note,) = pipeline.probe_notes()
    assert "layer 1 is probed whole: its rows differ from its own output by" in note
    with pytest.raises(UnsupportedModelError, match="its rows differ from its own output by"):
        trio.Pipeline(model, stages=[trio.Stage(after_layer=2, keep="50%", scorer={"name": "last-token-attention"})])
    assert adapter_for(model).why_whole(3) == ""


def test_a_kernel_without_a_backward_is_the_reason():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

    model = llava()
    layer = model.model.language_model.layers[1]
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, out: NoBackward.apply(out))
    layer.mlp.down_proj.register_forward_hook(lambda m, a, out: NoBackward.apply(out))
    with pytest.raises(UnsupportedModelError, match="no gradient comes through it"):
        trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%")])
