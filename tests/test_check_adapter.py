"""`check_adapter` finds what it is there to find: each fault is put in on purpose, and its promise must fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import llava

import trio
from trio.runtime import forward, hooks
from trio.runtime.cache import ReducedLayer
from trio.scorers.base import Scorer
from trio.testing import PROMISES, Prompt, TokenInputs, check_adapter, tiny_llava, varlen
from trio.testing.bench import attention_of
from trio.testing.inputs import draw_image

TOKENS = TokenInputs()


def failures(promise, **more):
    results = check_adapter(tiny_llava(layers=4), TOKENS, promises=[promise], raise_on_failure=False, **more)
    return {check.name: check.detail for check in results.failures}


def test_a_sound_runtime_keeps_every_promise():
    seen = []
    results = check_adapter(tiny_llava(layers=4), TOKENS, on_check=seen.append)
    assert results.passed
    assert seen == list(results)
    assert {check.promise for check in results} == set(PROMISES)
    assert all(check.detail and check.seconds >= 0 for check in results)
    assert str(results).count("[ok]") == len(results)


def test_failures_are_raised_with_promise_and_numbers(monkeypatch):
    monkeypatch.setattr(hooks.Runtime, "detach", lambda self: None)
    with pytest.raises(AssertionError, match=r"reversibility: after a forward: left behind.*\d+ in all"):
        check_adapter(tiny_llava(layers=4), TOKENS, promises=["reversibility"])


def test_changed_logits_break_identity(monkeypatch):
    def nudged(self, module, args, kwargs):
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * (1 + 1e-6)
        return args, kwargs

    monkeypatch.setattr(hooks.Runtime, "_before_language_model", nudged)
    monkeypatch.setattr(hooks.Runtime, "_after", lambda *_: None)
    assert "not bitwise" in failures("identity")["keep 100%, one image"]


def test_an_attribute_left_behind_breaks_reversibility(monkeypatch):
    attach = hooks.Runtime.attach

    def marking(self):
        self._backbone.layers[0].self_attn.trio_mark = True
        attach(self)

    monkeypatch.setattr(hooks.Runtime, "attach", marking)
    assert "self_attn.trio_mark" in failures("reversibility")["after a forward"]


def test_shifted_positions_break_decoding(monkeypatch):
    announce = ReducedLayer.announce

    def forgetful(self, coming):
        announce(self, replace(coming, dropped=None))

    monkeypatch.setattr(ReducedLayer, "announce", forgetful)
    found = failures("decode")
    assert "logits differ" in found["positions compact, one image"]
    assert not any("original" in name for name in found)  # where nothing is renumbered the count does not matter


def test_a_scorer_that_looks_at_the_whole_batch_breaks_the_batch_promise():
    class Ranked(Scorer):
        def score(self, ctx):
            norms = ctx.hidden.float().norm(dim=-1)
            return ctx.at_visual((norms * 1000 * norms.mean()).sin())

    stages = [{"after_layer": 1, "keep": "50%", "scorer": Ranked(), "selector": "top-k"}]
    assert "kept tokens are others" in failures("batch", stages=stages)["the given stages, padded on the left"]


def test_a_4d_mask_breaks_the_flash_convention(monkeypatch):
    def dense(config, hidden, valid, *, past, layer, window=None):
        batch, length = hidden.shape[:2]
        return torch.ones(batch, 1, length, past + length, dtype=torch.bool).tril(past)

    monkeypatch.setattr("trio.runtime.shrink.causal_mask", dense)
    assert "4 dimensions" in failures("attention")["flash-attention's convention"]


def test_positions_with_gaps_break_the_flash_convention():
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 8)
    positions = torch.tensor([[0, 1, 5]])
    with pytest.raises(AssertionError, match="packed"):
        varlen.attention(torch.nn.Module(), query, query, query, None, is_causal=True, position_ids=positions)


def test_guards_taken_out_break_refusals(monkeypatch):
    monkeypatch.setattr(hooks.Runtime, "_before_model", lambda *_: None)
    found = failures("refusals")
    assert {"labels", "training mode"} <= found.keys()
    assert "expected InputError" in found["labels"]


def test_selections_that_are_not_replayed_break_generation(monkeypatch):
    monkeypatch.setattr(forward.Prefill, "continues", lambda *_: False)
    assert "use_cache=False" in failures("generation")


def test_unknown_promises_and_inputs():
    with pytest.raises(trio.InputError, match="Did you mean 'identity'"):
        check_adapter(tiny_llava(), TOKENS, promises=["identiy"])
    with pytest.raises(trio.InputError, match="processor"):
        check_adapter(tiny_llava(), 5)
    with pytest.raises(trio.UnsupportedModelError):
        check_adapter(torch.nn.Linear(2, 2), TOKENS)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [7, 3, 1])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_stand_in_is_attention(side, queries, causal):
    """Against plain attention on each sample without its padding, the last query lined up with the last key."""
    torch.manual_seed(0)
    lengths = [7, 4]
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, (slice(0, length) if side == "right" else slice(7 - length, 7))] = True
    if side == "none":
        mask, lengths = None, [7, 7]
    if side == "right" and 1 < queries < 7:
        return check_queries_at_the_end(query, key, value, mask, causal)
    got, weights = varlen.attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, is_causal=causal)
    assert weights is None and got.shape == (2, queries, 4, 8)
    for row, length in enumerate(lengths):
        there = slice(None) if mask is None else mask[row]
        asking = queries if queries == 1 else min(queries, length)
        first = slice(0, asking) if side == "right" and queries > 1 else slice(queries - asking, queries)
        k, v = (t[row][:, there].repeat_interleave(2, 0) for t in (key, value))
        seen = torch.ones(asking, length, dtype=torch.bool)
        seen = seen.tril(length - asking) if causal else seen
        own = query[row][:, first]
        expected = torch.nn.functional.scaled_dot_product_attention(own, k, v, attn_mask=seen, scale=0.3)
        torch.testing.assert_close(got[row][first].transpose(0, 1), expected, rtol=1e-5, atol=1e-6)


def check_queries_at_the_end(query, key, value, mask, causal):
    """Flash-attention takes the last columns of the mask for the queries: those at padding give zeros."""
    got, _ = varlen.attention(torch.nn.Module(), query, key, value, mask, is_causal=causal)
    assert bool((got[1] == 0).all()) and not bool((got[0] == 0).any())


def test_the_stand_in_is_taken_out_again():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with pytest.raises(KeyError), varlen.registered(), varlen.registered() as name:
        assert name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS
        raise KeyError
    assert varlen.NAME not in ALL_ATTENTION_FUNCTIONS and varlen.NAME not in ALL_MASK_ATTENTION_FUNCTIONS


def test_attention_is_put_back():
    model = llava(attention="eager")
    with attention_of(model, "sdpa"):
        assert model.config.text_config._attn_implementation == "sdpa"
    names = {model.config._attn_implementation, model.config.text_config._attn_implementation}
    assert names == {"eager"} and model.config.vision_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="nonsense"), attention_of(model, "nonsense"):
        pass
    assert model.config.text_config._attn_implementation == "eager"


def test_prompts_give_the_same_in_any_batch():
    first, second = Prompt("look at", 3, "please"), Prompt("and", 4, "or", 3)
    both, alone = TOKENS([second, first]), TOKENS([first])
    assert torch.equal(both["pixel_values"][2], alone["pixel_values"][0])
    assert torch.equal(both["input_ids"][1][both["attention_mask"][1].bool()], alone["input_ids"][0])
    assert second.images == (4, 3)
    assert draw_image(3).tobytes() == draw_image(3).tobytes() != draw_image(4).tobytes()
