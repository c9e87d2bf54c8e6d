"""Scorers: what they look at, on a real forward."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from support.models import inputs, llava, single

import trio
from trio.core.transfer import HostValues

PROMPTS = [[1, 5, "image", 7, 8, 9, 10], [1, "image", 6, "image", 7, 8], [1, 3, 4, 5]]


def scores(model, batch, scorer, after=2):
    stage = trio.Stage(after_layer=after, keep=4, scorer=scorer, selector="top-k")
    return trio.Pipeline(model, stages=[stage]).score(batch)[0]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("rows", ["after-picture", "prompt-end", "released"])
@pytest.mark.parametrize("probe_layer", ["next", "last"])
@pytest.mark.parametrize("prompt", [[1, 5, "image", 7, 8, 9, 10, 11], [1, 5, "image"], ["image", 5, "image", 4]])
def test_objective_gradient_in_a_forward(rows, probe_layer, prompt, skip):
    """Against autograd through the whole layer and head on the hidden states that the model itself gives."""
    model = llava(attention="eager")
    batch = inputs([prompt])
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[2]
    scorer = {"name": "objective-gradient", "rows": rows, "positions": 4, "skip": skip, "probe_layer": probe_layer}
    got = scores(model, batch, scorer)[0]
    text = model.model.language_model
    length = hidden.shape[1]
    leaf = hidden.detach().clone().requires_grad_(True)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rotary = text.rotary_emb(leaf, torch.arange(length)[None])
    layer = text.layers[2 if probe_layer == "next" else 1]
    logits = model.lm_head(text.norm(layer(leaf, attention_mask=mask, position_embeddings=rotary)))[0]
    end = length - (rows == "released") - skip
    ids = batch["input_ids"][0].tolist()
    behind = length - 1 - max(i for i, token in enumerate(ids) if token == 99)
    first = length - behind if rows == "after-picture" and behind else 0  # without text behind it: the prompt's end
    chosen = logits[max(first, end - 4) : end]
    loss = torch.nn.functional.cross_entropy(chosen, chosen.argmax(-1))
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = gradient[0].norm(dim=-1)[batch["input_ids"][0] == 99]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_last_token_attention_is_the_layers_own():
    model = llava(attention="eager")
    batch = inputs(PROMPTS[:1])
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions[1]  # of the layer that runs before the stage
    expected = attention[0, :, -1].mean(0)[batch["input_ids"][0] == 99]
    torch.testing.assert_close(scores(model, batch, "last-token-attention")[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scorer", ["objective-gradient", "last-token-attention", "random"])
def test_a_batch_scores_as_its_samples_alone(scorer):
    model = llava()
    together = scores(model, inputs(PROMPTS), scorer)
    for place in range(2):
        alone = scores(model, single(PROMPTS, place), scorer)[0]
        torch.testing.assert_close(together[place], alone, rtol=1e-4, atol=1e-7)
    assert len(together[2]) == 0


def test_random_is_uniform_and_depends_on_prompt_and_seed():
    model = llava()
    a, b = scores(model, inputs(PROMPTS), {"name": "random", "seed": 1})[:2]
    assert not torch.equal(a, b[:16])
    again = scores(model, inputs(PROMPTS), {"name": "random", "seed": 1})[0]
    other = scores(model, inputs(PROMPTS), {"name": "random", "seed": 2})[0]
    assert torch.equal(a, again) and not torch.equal(a, other)
    many = torch.cat([scores(model, inputs([[1, "image", 7, n]]), "random")[0] for n in range(2, 60)])
    assert abs(float(many.mean()) - 0.5) < 0.05 and float(many.min()) >= 0 and float(many.max()) < 1


def test_scoring_drops_nothing_and_leaves_nothing_behind():
    model = llava()
    batch = inputs(PROMPTS)
    with torch.no_grad():
        before = model(**batch).logits
        scores(model, batch, "objective-gradient")
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("scorer", ["last-token-attention", {"name": "objective-gradient", "probe_layer": "last"}])
def test_scorers_of_the_layer_just_run_are_refused_at_the_input(scorer):
    with pytest.raises(trio.UnsupportedModelError, match="use after_layer: 1 or more"):
        scores(llava(), inputs(PROMPTS), scorer, after=0)


def test_attention_rows_are_refused_where_the_anatomy_is_unknown(monkeypatch):
    model = llava()
    for layer in model.model.language_model.layers:
        stock = type(layer).forward
        monkeypatch.setattr(layer, "forward", lambda *a, _s=stock, _l=layer, **k: _s(_l, *a, **k) * 1.25)
    with pytest.raises(
        trio.UnsupportedModelError, match=r"needs attention-rows.*Scorers that fit: .*objective-gradient"
    ):
        scores(model, inputs(PROMPTS), "last-token-attention")
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=2, keep=4)])
    with pipeline:
        model(**inputs(PROMPTS))
    assert any("probed whole" in note for note in pipeline.report.notes)


def test_a_prefill_waits_for_the_device_at_its_start_and_at_its_end(monkeypatch):
    """Ids and mask through `HostValues`, one look at all flags, however many stages there are."""
    model, batch, looks = llava(), inputs(PROMPTS), []
    for name in ("cpu", "tolist", "item", "__bool__"):
        stock = getattr(torch.Tensor, name)

        def looking(tensor, *args, _stock=stock, _name=name, **kwargs):
            caller = sys._getframe(1).f_code
            if f"{os.sep}trio{os.sep}" in caller.co_filename:
                looks.append(caller.co_name)
            return _stock(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, looking)
    looked = HostValues.look  # on a processor there is nothing to copy; tests/test_transfer.py counts on `meta`
    monkeypatch.setattr(HostValues, "look", lambda self, tensors: looks.append("look") or looked(self, tensors))
    stages = [trio.Stage(after_layer=layer, keep=16 - 4 * layer, selector="top-k") for layer in (1, 2, 3)]
    pipeline = trio.Pipeline(model, stages=stages)
    with pipeline, torch.no_grad():
        looks.clear()
        model(**batch)
    on_device = [name for name in looks if name not in HOST_ONLY]
    assert on_device == ["look", "look", "_check_finite"]  # the second time at what is known


#: These look at tensors that `HostValues` has brought to the host, or that were made there.
HOST_ONLY = {
    "start",
    "_split",
    "<genexpr>",
    "<listcomp>",
    "images_by_count",
    "first_k",
    "groups",
    "fill_layers",
    "_check_samples",
}
