"""Models that others have wrapped, offloaded or quantised, and caches that others handle."""

from __future__ import annotations

import copy

import pytest
import torch
from support.bench import TOKENS, bench
from support.models import llava

import trio
from trio.core.upstream import Role, cache_of, keywords
from trio.testing import Prompt, check_adapter
from trio.testing.bench import NEW, ONE, RAGGED, TWO, extended

pytestmark = pytest.mark.contract

STAGES = [{"after_layer": 1, "keep": "50%"}, {"after_layer": 3, "keep": "25%"}]


def test_lora():
    from peft import LoraConfig, get_peft_model

    stock = llava()
    torch.manual_seed(1)
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)", init_lora_weights=False)
    model = get_peft_model(stock, config).eval()
    check_adapter(model, TOKENS)
    pipeline = trio.Pipeline(model, stages=STAGES)
    with pipeline:
        model.generate(**TOKENS([ONE]), max_new_tokens=2)
    with model.disable_adapter(), pipeline:
        model.generate(**TOKENS([ONE]), max_new_tokens=2)
    assert len(pipeline.reports) == 2
    assert pipeline.adapter.probe_kind(3) == "rows"


def test_offloaded_weights():
    from accelerate import cpu_offload

    work = bench(llava())
    inputs = work.inputs(*RAGGED)
    pipeline = work.pipeline()
    with pipeline:
        expected = work.generate(inputs)
        selection = pipeline.report.selection()
    model = cpu_offload(llava(), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    other = trio.Pipeline(model, stages=work.settings[0].stages)
    with other:
        found = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert other.report.selection() == selection
    assert torch.equal(found.logits[0], expected.logits[0])
    assert other.adapter.probe_kind(3) == "rows"


class Int8Linear(torch.nn.Module):
    """Weights in 8 bits, one scale a row; as with many quantised kernels, gradients may not come through.

    With `dynamic` the activations are rounded as well, each token by its own scale.
    """

    def __init__(self, linear, *, backward, dynamic):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.backward, self.dynamic = backward, dynamic

    def forward(self, x):
        with torch.set_grad_enabled(self.backward and torch.is_grad_enabled()):
            if self.dynamic:
                step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
                x = x + ((x / step).round() * step - x).detach()
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised(*, backward, dynamic=False):
    model = llava()
    for layer in model.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    new = Int8Linear(child.requires_grad_(False), backward=backward, dynamic=dynamic)
                    setattr(parent, name, new)
    return model


def test_quantised_layers():
    model = quantised(backward=True)
    check_adapter(model, TOKENS)
    assert trio.Pipeline(model, stages=STAGES).adapter.probe_kind(3) == "rows"


def test_quantised_layers_without_a_backward():
    """Gradients would be zero without a word: refused by name, and scorers that need none work."""
    model = quantised(backward=False)
    with pytest.raises(trio.UnsupportedModelError, match=r"needs objective.*fit: last-token-attention") as refused:
        trio.Pipeline(model, stages=STAGES)
    assert "objective-gradient" not in str(refused.value).partition("fit:")[2]
    assert "quantised (int8)" in str(refused.value) and "as they come" not in str(refused.value)
    stages = [{**stage, "scorer": "last-token-attention", "selector": "top-k"} for stage in STAGES]
    check_adapter(model, TOKENS, stages=stages, promises=["identity", "reversibility", "decode", "batch"])


@pytest.mark.parametrize("configured", [True, False])
def test_activations_that_are_quantised_as_they_come_are_named(configured):
    """Without a backward they are refused: the message says which kind it is, and which ones work."""
    model = quantised(backward=False, dynamic=True)
    if configured:
        kind = "Int8DynamicActivationInt8WeightConfig"
        model.config.quantization_config = {"quant_method": "torchao", "quant_type": kind}
    with pytest.raises(trio.UnsupportedModelError, match="activations are quantised as they come") as refused:
        trio.Pipeline(model, stages=STAGES)
    said = str(refused.value)
    assert ("(torchao Int8DynamicActivationInt8WeightConfig, int8)" in said) is configured
    for works in ("torchao int8 weight-only", "bitsandbytes nf4", "bitsandbytes int8"):
        assert works in said


def test_activations_that_are_quantised_with_a_backward_work():
    """As in bitsandbytes int8: nothing about them is refused."""
    model = quantised(backward=True, dynamic=True)
    with trio.Pipeline(model, stages=STAGES) as pipeline:
        model.generate(**TOKENS([ONE]), max_new_tokens=2)
    assert pipeline.report.retention < 1
    check_adapter(model, TOKENS, tolerance=5e-2, promises=["identity", "reversibility", "refusals", "nothing-lost"])


def test_a_model_that_is_not_quantised_is_not_called_so():
    """Gradients that do not come through have other reasons, too."""
    model = llava()
    for layer in model.model.language_model.layers:
        project = layer.self_attn.o_proj
        project.forward = lambda x, forward=project.forward: forward(x).detach()
    with pytest.raises(trio.UnsupportedModelError, match="no gradient comes through it") as refused:
        trio.Pipeline(model, stages=STAGES)
    assert "quantis" not in str(refused.value)


def test_a_layer_of_unknown_anatomy():
    """The probe falls back to the whole layer, says so, and gives the same tokens."""

    class Renamed(torch.nn.Module):
        """An MLP under another name: its layer's anatomy is not known any more."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, *args, **kwargs):
            return self.layer(hidden_states, *args, **kwargs)

    model = llava()
    work = bench(model)
    inputs = work.inputs(*RAGGED)
    known = trio.Pipeline(model, stages=STAGES)
    with known:
        expected = work.forward(inputs)
    layers = model.model.language_model.layers
    for index in range(len(layers)):
        layers[index] = Renamed(layers[index])
    unknown = trio.Pipeline(model, stages=STAGES)
    with unknown:
        found = work.forward(inputs)
    assert torch.equal(found, expected)
    assert unknown.report.selection() == known.report.selection()
    assert any("whole" in note for note in unknown.report.notes)
    assert not any("whole" in note for note in known.report.notes)
    check_adapter(model, TOKENS, stages=STAGES, promises=["decode", "batch"])


def test_cache_copied_and_cropped():
    """Two second turns from one first turn: on a copy of its cache, and on the cache cropped back to the same place."""
    work = bench(llava())
    pipeline = work.pipeline()
    first = work.inputs(ONE)
    question = work.inputs(Prompt("And what about the rest ?"))["input_ids"]
    with pipeline:
        answer = work.generate(first)
        before = pipeline.report.selection()
        cache = cache_of(answer)
        held = cache.get_seq_length()
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        conversation = extended(first, torch.cat([answer.sequences, question], 1))
        conversation.pop("pixel_values")
        twin = copy.deepcopy(cache)
        one = work.generate(conversation, **keywords({Role.CACHE: twin}))
        two = work.generate(conversation, **keywords({Role.CACHE: cache}))
        cache.crop(held - cache.get_seq_length())
        assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
        three = work.generate(conversation, **keywords({Role.CACHE: cache}))
        whole = extended(first, two.sequences[:, :-1])
        with pipeline.replay(before):
            expected = work.forward(whole)[:, -NEW:]
        with pytest.raises(trio.CacheError, match="visual"):
            cache.crop(3 - held)
    work.close(torch.stack(two.logits, 1), expected, "second turn")
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))
    work.close(torch.stack(three.logits), torch.stack(two.logits), "after crop")


def test_a_reduced_cache_needs_its_pipeline():
    work = bench(llava())
    pipeline = work.pipeline()
    first = work.inputs(ONE)
    with pipeline:
        answer = work.generate(first)
    conversation = extended(first, torch.cat([answer.sequences, answer.sequences[:, :3]], 1))
    conversation.pop("pixel_values")
    with pytest.raises(trio.CacheError, match=r"trio\.testing"):
        work.generate(conversation, **keywords({Role.CACHE: cache_of(answer)}))
    other = trio.Pipeline(work.model, stages=STAGES, name="another")
    with other, pytest.raises(trio.CacheError, match="another"):
        work.generate(conversation, **keywords({Role.CACHE: cache_of(answer)}))


@pytest.mark.parametrize("how", ["sliding", "quantized"])
def test_caches_that_cannot_hold_ragged_layers(how):
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    work = bench(llava())
    inputs = work.inputs(ONE, TWO)
    if how == "sliding":
        cache = DynamicCache()
        cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(6)]
        given = keywords({Role.CACHE: cache})
        error = trio.CacheError
    else:
        given = {"cache_implementation": "quantized"}
        error = trio.InputError
    with work.pipeline(), pytest.raises(error, match=r"DynamicCache|dynamic"):
        work.generate(inputs, **given)


def test_half_precision_keeps_the_same_tokens():
    """In bfloat16, batches against singles over many samples: at least 99% of the same tokens."""
    for scorer in trio.SCORERS.names():
        common = total = 0
        for seed in range(3):
            model = llava(dtype=torch.bfloat16, seed=seed)
            work = bench(model)
            pipeline = trio.Pipeline(model, stages=[{"after_layer": 2, "keep": 8, "scorer": scorer}])
            for first in range(0, 24, 4):
                prompts = [Prompt("what is " * (i + 1), first + i, "left of " * (3 - i)) for i in range(4)]
                with pipeline:
                    work.forward(work.inputs(*prompts))
                    together = pipeline.report.selection()[0]
                    for number, prompt in enumerate(prompts):
                        work.forward(work.inputs(prompt))
                        (alone,) = pipeline.report.selection()[0]
                        common += len(set(alone[0]) & set(together[number][0]))
                        total += 8
        assert total == 576
        assert common / total >= 0.99, f"{scorer}: {common} of {total}"
