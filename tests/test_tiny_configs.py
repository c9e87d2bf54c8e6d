"""Small copies of configurations: they build fast, run with images, and keep what makes a family."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from support.families import FAMILIES, family

import trio
from trio.adapters import adapter_for, families, tiny
from trio.adapters.tiny_inputs import MAKERS, tiny_inputs
from trio.core.prompts import Prompt

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore:no adapter knows")]

MAKE = {
    "llava": tiny.llava,
    "llava-next": tiny.llava_next,
    "llava-onevision": tiny.llava_onevision,
    "qwen2-vl": tiny.qwen_vl,
    "qwen2.5-vl": tiny.qwen_vl,
    "qwen3-vl": tiny.qwen_vl,
    "internvl": families()["internvl"].tiny_config,
}
PROMPTS = [
    Prompt("what is", 1, "this thing or that"),
    Prompt("now", 2, "and", 3, "differ in what"),
    Prompt("no picture"),
]


def tiny_config(name, config):
    return MAKE.get(name, tiny.generic)(config)


def built(cls, config):
    torch.manual_seed(0)
    start = time.process_time()
    model = cls(config).eval()
    assert time.process_time() - start < 1
    return model


def runs(model, config):
    """One forward of a ragged batch with images, stock and reduced."""
    batch = families()[config.model_type].tiny_inputs(config)(PROMPTS)
    assert int(batch["input_ids"].max()) < config.get_text_config().vocab_size
    with torch.no_grad():
        stock = model(**batch).logits
        with trio.Pipeline(model, stages=[trio.Stage(after_layer=4, keep=3)]) as pipeline:
            model(**batch)
    assert bool(stock.isfinite().all()) and stock.shape[:2] == batch["input_ids"].shape
    kept = [[group.kept for group in sample.stages[0].groups] for sample in pipeline.report.samples if sample.stages]
    assert [len(images) for images in kept][:2] == [1, 2] and all(k == 3 for images in kept for k in images)


@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_default_configuration_of_the_class(name):
    model, _ = family(name)
    cls = type(model)
    full = cls.config_class()
    config = tiny_config(name, full)
    assert type(config) is type(full) and type(config.text_config) is type(full.text_config)
    assert type(config.vision_config) is type(full.vision_config)
    small = built(cls, config)
    assert sum(parameter.numel() for parameter in small.parameters()) < 1_000_000
    assert type(adapter_for(small)) is type(adapter_for(model))
    runs(small, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_configuration_of_a_tiny_model(name):
    model, _ = family(name)
    config = tiny_config(name, model.config)
    runs(built(type(model), config), config)
    again = tiny_config(name, config)
    assert again.to_dict() == config.to_dict()


OTHERS = ["Ernie4_5_VLMoe", "Glm46V", "Glm4vMoe", "GlmOcr", "Idefics3", "LightOnOcr", "VideoLlava"]


@pytest.mark.parametrize("name", OTHERS)
def test_further_families_of_the_generic_adapter(name):
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    config = tiny.generic(cls.config_class())
    runs(built(cls, config), config)


def test_every_configuration_has_inputs():
    assert set(tiny.GENERIC) <= set(MAKERS)


def test_the_model_s_own_configuration_stays_as_it_is():
    for name in FAMILIES:
        model, _ = family(name)
        before = model.config.to_dict()
        tiny_config(name, model.config)
        assert model.config.to_dict() == before


# What stays


def text(kind, **given):
    return tiny.shrunk_text(transformers.AutoConfig.for_model(kind, **given))


def test_every_kind_of_layer_stays():
    kinds = ["sliding_attention"] * 28 + ["full_attention"] * 4
    small = text("qwen2", num_hidden_layers=32, layer_types=kinds, use_sliding_window=True, sliding_window=4096)
    assert small["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert (small["num_hidden_layers"], small["sliding_window"]) == (6, tiny.WINDOW)
    assert small["max_position_embeddings"] > tiny.WINDOW
    gemma = text("gemma3_text", num_hidden_layers=26)
    assert set(gemma["layer_types"]) == {"sliding_attention", "full_attention"} and len(gemma["layer_types"]) == 6


@pytest.mark.parametrize(("heads", "groups", "kept"), [(32, 32, 4), (32, 8, 2), (32, 1, 1)])
def test_grouped_queries_stay_grouped(heads, groups, kept):
    small = text("llama", num_attention_heads=heads, num_key_value_heads=groups)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, kept)


def test_positions_keep_their_axes():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2_5_VLConfig(text_config={"rope_parameters": rope})
    assert tiny.qwen_vl(config).text_config.rope_parameters == {**rope, "mrope_section": [2, 3, 3]}
    half = {**rope, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    small = tiny.generic(transformers.Glm4vConfig(text_config={"rope_parameters": half}))
    assert sum(small.text_config.rope_parameters["mrope_section"]) == tiny.HEAD // 4


def test_long_rope_loses_the_factors_of_features_that_are_gone():
    factors = [1.0 + place for place in range(64)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": factors, "short_factor": factors}
    small = text("llama", rope_parameters={**rope, "original_max_position_embeddings": 2048, "factor": 4.0})
    assert small["rope_parameters"]["long_factor"] == small["rope_parameters"]["short_factor"] == factors[:8]


def test_ids_move_into_the_small_vocabulary_and_none_ends_a_text():
    full = transformers.Qwen2_5_VLConfig()
    full.text_config.eos_token_id = 151645
    config = tiny.qwen_vl(full)
    numbers = tiny.placeholders(config)
    assert len(numbers) == 4 and config.image_token_id in numbers and config.video_token_id in numbers
    assert all(92 < number < tiny.VOCABULARY for number in numbers)
    assert config.text_config.vocab_size == tiny.VOCABULARY
    assert config.text_config.eos_token_id is None and config.text_config.pad_token_id in (0, None)


def test_a_mixture_of_experts_stays_one():
    small = text("mixtral", num_local_experts=8, num_experts_per_tok=4)
    assert (small["num_local_experts"], small["num_experts_per_tok"]) == (4, 2)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma2", "gemma3_text", "phi3", "cohere2", "gpt_oss", "olmo3"])
def test_any_decoder_of_the_usual_kind_runs(kind):
    """Experts, sandwich norms, windows, sinks, partial rotation: behind LLaVA's projector."""
    full = transformers.LlavaConfig(text_config=transformers.AutoConfig.for_model(kind))
    config = tiny.llava(full)
    model = built(transformers.LlavaForConditionalGeneration, config)
    with torch.no_grad():
        assert bool(model(**tiny_inputs(config)(PROMPTS)).logits.isfinite().all())


def test_quantisation_and_dtype_are_left_out():
    full = transformers.LlavaConfig(dtype="bfloat16")
    full.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = tiny.llava(full)
    assert config.dtype is None and not hasattr(config, "quantization_config")


def test_what_is_not_known_gives_none():
    assert tiny.generic(transformers.AriaConfig()) is None
    assert text("deepseek_v3") is None and text("lfm2") is None and text("gemma3n_text") is None
    assert tiny.llava(transformers.LlavaConfig(text_config=transformers.DeepseekV3Config())) is None
    assert tiny.shrunk_clip_like(transformers.Qwen2_5_VLConfig().vision_config) is None
    assert tiny.shrunk_patch_merger(transformers.CLIPVisionConfig()) is None
    with pytest.raises(trio.InputError, match=r"type 'aria'; known are .*llava"):
        tiny_inputs(transformers.AriaConfig())
