"""The K-row saliency against plain autograd through the whole layer, the final norm and the head."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import VOCABULARY, llava
from torch.nn import functional as F

from trio.adapters import adapter_for, decoder_probe
from trio.adapters.base import Adapter
from trio.adapters.decoder_probe import RowProbe, values_are_linear
from trio.core.probe import LayerInputs, Past, Rows, rows_at_end

LAYER = 3
TEXTS = ["llama", "mistral", "qwen2", "qwen3"]


def naive_saliency(
    adapter: Adapter,
    inputs: LayerInputs,
    rows: list[list[int]],
    layer: int = LAYER,
    head: torch.nn.Module | None = None,
) -> torch.Tensor:
    """One sample at a time, without its padding: the whole layer, all logits, torch's own cross-entropy."""
    model = adapter.model
    out = torch.zeros(inputs.valid.shape)
    for sample, chosen in enumerate(rows):
        columns = inputs.valid[sample].nonzero().squeeze(1)
        hidden = inputs.hidden[sample : sample + 1, columns].detach().clone().requires_grad_(True)
        cos, sin = inputs.rotary
        rotary = cos[sample : sample + 1, columns], sin[sample : sample + 1, columns]
        length = len(columns)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        result = adapter.layers[layer](hidden, attention_mask=mask, position_embeddings=rotary)
        logits = (head or model.lm_head)(model.model.language_model.norm(result))[0].float()
        places = [int((columns == row).nonzero()) for row in chosen]
        loss = F.cross_entropy(logits[places], logits[places].argmax(-1))
        (gradient,) = torch.autograd.grad(loss, hidden)
        out[sample, columns] = gradient[0].float().norm(dim=-1)
    return out


def layer_inputs(model, lengths: list[int], side: str = "left", dtype=torch.float32, seed: int = 1) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    hidden = torch.randn(len(lengths), longest, 32, generator=generator).to(dtype)
    valid = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        valid[sample, longest - length :] = side == "left"
        if side == "right":
            valid[sample, :length] = True
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    embeddings = model.model.language_model.rotary_emb(hidden, positions)
    return LayerInputs(hidden, valid, embeddings)


def last(valid: torch.Tensor, count: int, skip: int = 0) -> list[list[int]]:
    found = []
    for row in valid:
        columns = row.nonzero().squeeze(1).tolist()
        columns = columns[: len(columns) - skip]
        found.append(columns[-count:])
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("sums", [False, True])  # values of all tokens, or of their weighted sums
def test_saliency_is_the_gradient_of_the_whole_layer(text, side, skip, sums, monkeypatch):
    monkeypatch.setattr(decoder_probe, "sums_are_cheaper", lambda *sizes: sums)
    model = llava(text, attention="eager")
    adapter = adapter_for(model)
    inputs = layer_inputs(model, [23, 17, 9, 3], side)  # the last has fewer rows than are supervised with skip
    assert adapter.probe_kind(LAYER) == "rows"
    saliency = adapter.probe(LAYER, inputs).saliency(rows_at_end(inputs.valid, 4, skip=skip))
    expected = naive_saliency(adapter, inputs, last(inputs.valid, 4, skip))
    assert expected.max() > 1e-4
    # Relative to each sample's own largest: the rows at the end (visual tokens at the very end) are among them.
    for sample in range(4):
        valid = inputs.valid[sample]
        torch.testing.assert_close(
            saliency[sample][valid], expected[sample][valid], rtol=1e-5, atol=1e-5 * float(expected[sample].max())
        )


@pytest.mark.parametrize(("length", "projected"), [(12, 12), (300, 4 * 2)])
def test_values_are_projected_for_all_tokens_or_for_the_sums_that_the_rows_read(length, projected):
    """Two rows and four heads: eight sums, where there are many more tokens."""
    model = llava(attention="eager")
    adapter = adapter_for(model)
    inputs = layer_inputs(model, [length])
    probe, seen = adapter.probe(LAYER, inputs), []
    value = adapter.layers[LAYER].self_attn.v_proj
    with value.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])):
        saliency = probe.saliency(rows_at_end(inputs.valid, 2))
    assert seen == [projected]
    expected = naive_saliency(adapter, inputs, last(inputs.valid, 2))
    torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


class Quantised(torch.nn.Linear):
    """Activations to eight bits, each row by its own largest number."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / scale).round() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_projection_is_tried_before_it_is_taken_for_linear(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, 1024).to(dtype)
    linear = torch.nn.Linear(1024, 256).to(dtype)
    normed = torch.nn.Sequential(linear, torch.nn.RMSNorm(256).to(dtype))
    adapted = get_peft_model(torch.nn.Sequential(linear), LoraConfig(target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        assert values_are_linear(linear, hidden)
        assert values_are_linear(adapted.eval().to(dtype), hidden)
        assert not values_are_linear(normed, hidden)
        assert not values_are_linear(Quantised(1024, 256).to(dtype), hidden)


def test_values_that_are_not_linear_are_projected_for_all_tokens():
    model = llava(attention="eager")
    attention = model.model.language_model.layers[LAYER].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj, torch.nn.RMSNorm(attention.v_proj.out_features))
    adapter = adapter_for(model)
    inputs = layer_inputs(model, [300])
    saliency = adapter.probe(LAYER, inputs).saliency(rows_at_end(inputs.valid, 2))
    assert adapter.probe_kind(LAYER) == "rows"
    expected = naive_saliency(adapter, inputs, last(inputs.valid, 2))
    torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_saliency_of_rows_anywhere_in_the_sequence():
    model = llava(attention="eager")
    adapter = adapter_for(model)
    inputs = layer_inputs(model, [20, 20])
    rows = Rows(torch.tensor([[3, 11], [0, 19]]), torch.ones(2, 2, dtype=torch.bool))
    saliency = adapter.probe(LAYER, inputs).saliency(rows)
    torch.testing.assert_close(saliency, naive_saliency(adapter, inputs, [[3, 11], [0, 19]]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("text", TEXTS)
def test_whole_layer_fallback_gives_the_same_values(text, monkeypatch):
    model = llava(text)
    known, unknown = adapter_for(model), adapter_for(model)
    monkeypatch.setattr(unknown, "anatomy", lambda layer: None)
    assert (known.probe_kind(LAYER), unknown.probe_kind(LAYER)) == ("rows", "layer")
    inputs = layer_inputs(model, [19, 12, 7])
    rows = rows_at_end(inputs.valid, 4)
    a, b = (adapter.probe(LAYER, inputs) for adapter in (known, unknown))
    torch.testing.assert_close(a.output_rows(rows), b.output_rows(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.saliency(rows)[inputs.valid], b.saliency(rows)[inputs.valid], rtol=1e-4, atol=1e-6)


def test_the_input_embedding_can_be_the_output_head():
    model = llava(attention="eager")
    adapter = adapter_for(model)
    inputs, table = layer_inputs(model, [23, 17]), model.get_input_embeddings().weight
    head = torch.nn.Linear(table.shape[1], table.shape[0], bias=False)
    head.weight = table
    rows = rows_at_end(inputs.valid, 4)
    saliency = adapter.probe(LAYER, inputs).saliency(rows, head="input-embedding")
    expected = naive_saliency(adapter, inputs, last(inputs.valid, 4), head=head)
    torch.testing.assert_close(saliency, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert not torch.allclose(saliency, adapter.probe(LAYER, inputs).saliency(rows), rtol=1e-2)  # its own head


def test_a_packed_input_embedding_is_refused_by_name():
    model = llava()
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(torch.zeros(table.weight.numel() // 2, dtype=torch.uint8), requires_grad=False)
    adapter = adapter_for(model)
    assert "no plain matrix" in adapter.why_not(LAYER, "input-embedding")
    assert "input-embedding" not in adapter.offers(LAYER)


def test_a_layer_that_computes_something_else_is_found_out(monkeypatch):
    model = llava()
    layer = model.model.language_model.layers[LAYER]
    stock = type(layer).forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: stock(layer, *a, **k) * 1.5)
    adapter = adapter_for(model)
    assert adapter.probe_kind(LAYER) == "layer"
    assert adapter.probe_kind(LAYER - 1) == "rows"
    assert adapter.offers(LAYER) == {"objective", "input-embedding"}


def test_past_keys_and_values_count():
    """A second turn: the probe with a past equals the rows of the whole conversation."""
    model = llava("qwen3", attention="eager")
    adapter = adapter_for(model)
    whole = layer_inputs(model, [21, 14])
    cut = 8
    attention = adapter.layers[LAYER].self_attn
    hidden = adapter.layers[LAYER].input_layernorm(whole.hidden[:, :cut])
    heads = (2, cut, -1, attention.head_dim)
    keys = attention.k_norm(attention.k_proj(hidden).view(heads)).transpose(1, 2)
    values = attention.v_proj(hidden).view(heads).transpose(1, 2)
    cos, sin = (e[:, None, :cut] for e in whole.rotary)
    half = keys.shape[-1] // 2
    keys = keys * cos + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin
    later = LayerInputs(
        whole.hidden[:, cut:],
        whole.valid[:, cut:],
        tuple(e[:, cut:] for e in whole.rotary),
        Past(keys.detach(), values.detach(), whole.valid[:, :cut]),
    )
    rows = rows_at_end(whole.valid, 3)
    rows_later = Rows(rows.index - cut, rows.valid)
    expected = adapter.probe(LAYER, whole)
    for probe in (adapter.probe(LAYER, later), _whole(adapter, later)):
        torch.testing.assert_close(probe.output_rows(rows_later), expected.output_rows(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probe.saliency(rows_later), expected.saliency(rows)[:, cut:], rtol=1e-4, atol=1e-6)


def _whole(adapter, inputs):
    blind = adapter_for(adapter.model)
    blind.anatomy = lambda layer: None
    return blind.probe(LAYER, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_picks_what_float32_picks(dtype):
    """Top-k overlap of at least 95% on the same rounded weights and hidden states, over many samples."""
    half = llava(dtype=dtype)
    full = llava()
    full.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    overlaps = []
    for seed in range(12):
        inputs = layer_inputs(half, [130, 130], dtype=dtype, seed=seed)
        upcast = LayerInputs(inputs.hidden.float(), inputs.valid, tuple(e.float() for e in inputs.rotary))
        rows = rows_at_end(inputs.valid, 4)
        low = adapter_for(half).probe(LAYER, inputs).saliency(rows)[:, :120]
        high = adapter_for(full).probe(LAYER, upcast).saliency(rows)[:, :120]
        assert torch.isfinite(low).all()
        for a, b in zip(low.topk(40).indices.tolist(), high.topk(40).indices.tolist(), strict=True):
            overlaps.append(len(set(a) & set(b)) / 40)
    assert sum(overlaps) / len(overlaps) >= 0.95


def test_a_very_sure_model_does_not_underflow_in_float16():
    model = llava(dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # logits far apart: softmax within rounding of one-hot
    inputs = layer_inputs(model, [40], dtype=torch.float16)
    saliency = adapter_for(model).probe(LAYER, inputs).saliency(rows_at_end(inputs.valid, 4))
    assert torch.isfinite(saliency).all()
    assert (saliency > 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_saliency_within_no_grad_and_inference_mode(mode):
    model = llava()
    inputs = layer_inputs(model, [15, 11])
    rows = rows_at_end(inputs.valid, 4)
    expected = adapter_for(model).probe(LAYER, inputs).saliency(rows)
    with mode():
        inputs = layer_inputs(model, [15, 11])
        torch.testing.assert_close(
            adapter_for(model).probe(LAYER, inputs).saliency(rows_at_end(inputs.valid, 4)), expected
        )


def test_attention_rows_equal_eager_attention():
    model = llava("qwen3", attention="eager")
    adapter = adapter_for(model)
    inputs = layer_inputs(model, [18, 13])
    rows = rows_at_end(inputs.valid, 2)
    mask = torch.full((18, 18), float("-inf")).triu(1) + torch.zeros(2, 1, 18, 18)
    mask = mask.masked_fill(~inputs.valid[:, None, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        layer = adapter.layers[LAYER]
        _, weights = layer.self_attn(layer.input_layernorm(inputs.hidden), inputs.rotary, attention_mask=mask)
    probe = adapter.probe(LAYER, inputs)
    assert isinstance(probe, RowProbe)
    torch.testing.assert_close(probe.attention_rows(rows), weights[:, :, -2:], rtol=1e-5, atol=1e-6)


def test_rows_at_end_counts_valid_columns_only():
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]], dtype=torch.bool)
    rows = rows_at_end(valid, 3)
    assert rows.index.tolist() == [[2, 3, 4], [1, 0, 1], [0, 2, 4]]
    assert rows.valid.tolist() == [[True, True, True], [False, True, True], [True, True, True]]
    rows = rows_at_end(valid, 2, skip=1)
    assert rows.index[0].tolist() == [2, 3] and rows.index[2].tolist() == [0, 2]
    assert rows.valid[1].tolist() == [False, True] and rows.index[1, 1] == 0


def test_the_head_is_looked_at_for_the_chosen_rows_only():
    model = llava()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    inputs = layer_inputs(model, [30, 25])
    adapter_for(model).probe(LAYER, inputs).saliency(rows_at_end(inputs.valid, 4))
    assert shapes[-1] == (2, 4, VOCABULARY)
