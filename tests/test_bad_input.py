"""Bad input: the exact exception, the place and the remedy; afterwards the model answers bitwise as before."""

from __future__ import annotations

import threading

import pytest
import torch
from support.models import IMAGE_TOKEN, inputs, llava, text_config
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache

import trio
from trio.core.upstream import Role, cache_of, keywords

PROMPTS = [[1, 5, "image", 7, 8, 9, 10], [1, "image", 6, "image", 7, 8], [1, 3, 4, 5]]


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture
def answers_as_before(model):
    """Compares the model's logits, bitwise, before and after the test; a test may leave nothing on the model."""
    batch = inputs(PROMPTS)
    with torch.no_grad():
        model(**batch)  # transformers leaves things of its own after a first call
        before = model(**batch).logits
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    yield
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in our_modules(model))


def our_modules(model):
    return [model, model.model, model.model.language_model]


def stages(*pairs, **more):
    return [trio.Stage(after_layer=after, keep=keep, **more) for after, keep in pairs]


BUILD = {
    "a layer that the model lacks": (
        lambda: {"stages": stages((1, 8), (6, 4))},
        trio.SpecError,
        r"stages\[1\].*after_layer.*6",
    ),
    "growing counts": (
        lambda: {"stages": stages((1, 4), (3, 8))},
        trio.SpecError,
        r"stages\[1\].*keep: found 8, more than.*stages\[0\]",
    ),
    "two stages at one layer": (
        lambda: {"stages": stages((2, 8), (2, 4))},
        trio.SpecError,
        r"stages\[1\].*after_layer.*2",
    ),
    "shares that meet at one layer": (
        lambda: {"stages": stages(("50%", 8), (3, 4))},
        trio.SpecError,
        r"stages\[1\].*after_layer.*3",
    ),
    "nothing to do": (lambda: {"stages": []}, trio.SpecError, "stage"),
    "unknown scorer": (
        lambda: {"stages": stages((1, 8), scorer="objectiv-gradient")},
        trio.UnknownNameError,
        "objective-gradient",
    ),
    "unknown selector": (lambda: {"stages": stages((1, 8), selector="nsm")}, trio.UnknownNameError, "nms"),
    "wrong parameter": (
        lambda: {"stages": stages((1, 8), selector={"name": "nms", "treshold": 0.5})},
        trio.SpecError,
        "nms.*treshold.*threshold",
    ),
    "parameter out of range": (
        lambda: {"stages": stages((1, 8), scorer={"name": "objective-gradient", "positions": 0})},
        trio.SpecError,
        "objective-gradient.*positions",
    ),
    "unknown compressor": (lambda: {"compressor": {"name": "nothing", "keep": 4}}, trio.UnknownNameError, "nothing"),
    "attention of a layer that has not run": (
        lambda: {"stages": stages((0, 8), scorer="last-token-attention")},
        trio.UnsupportedModelError,
        "after_layer: 1 or more",
    ),
}


@pytest.mark.parametrize("case", BUILD)
@pytest.mark.usefixtures("answers_as_before")
def test_refused_when_built(case, model):
    fields, error, message = BUILD[case]
    with pytest.raises(error, match=message) as caught:
        trio.Pipeline(model, **fields())
    assert type(caught.value) is error


def test_a_budget_that_the_image_cannot_meet(model):
    pipeline = trio.Pipeline(model, stages=[{"after_layer": 5, "keep": "auto"}], budget={"average": 8})
    with pipeline, pytest.raises(trio.BudgetError, match=r"budget.average.*16 tokens.*reachable"):
        model(**inputs(PROMPTS))


def test_fewer_tokens_than_the_count(model):
    pipeline = trio.Pipeline(model, stages=stages((2, 20), if_fewer="error"))
    with pipeline, pytest.raises(trio.BudgetError, match=r"stages\[0\].*20 tokens.*16.*if_fewer"):
        model(**inputs(PROMPTS))


def test_unsupported_model_class():
    with pytest.raises(trio.UnsupportedModelError, match=r"LlamaForCausalLM.*get_image_features.*adapter") as caught:
        trio.Pipeline.from_spec("trio-11", LlamaForCausalLM(text_config("llama")))
    assert type(caught.value) is trio.UnsupportedModelError


def pipeline_for(model, **more):
    return trio.Pipeline(model, stages=stages((1, 9), (3, 4)), **more)


@pytest.mark.usefixtures("answers_as_before")
def test_attaching_twice(model):
    pipeline = pipeline_for(model)
    with pipeline, pytest.raises(trio.AttachError, match=r"this pipeline is already attached.*detach"):
        pipeline.attach()


@pytest.mark.usefixtures("answers_as_before")
def test_two_pipelines_on_one_model(model):
    with pipeline_for(model, name="first"), pytest.raises(trio.AttachError, match="'first' is already attached"):
        pipeline_for(model, name="second").attach()


@pytest.mark.usefixtures("answers_as_before")
def test_training_mode(model):
    model.train()
    try:
        with pytest.raises(trio.AttachError, match=r"model\.eval\(\)"):
            pipeline_for(model).attach()
        model.eval()
        with pipeline_for(model):
            model.train()
            with pytest.raises(trio.InputError, match=r"model\.eval\(\)"):
                model(**inputs(PROMPTS))
    finally:
        model.eval()


CALLS = {
    "labels": (lambda b: {"labels": b["input_ids"]}, trio.InputError, "labels.*detach"),
    "columns of logits": (lambda b: {"logits_to_keep": torch.tensor([3])}, trio.InputError, "logits_to_keep"),
    "a 4-D mask": (
        lambda b: {"attention_mask": torch.zeros(3, 1, *[b["input_ids"].shape[1]] * 2)},
        trio.InputError,
        r"attention_mask.*2-D",
    ),
    "a static cache": (
        lambda b: keywords({Role.CACHE: StaticCache(text_config("llama"), max_cache_len=64)}),
        trio.CacheError,
        "StaticCache.*DynamicCache",
    ),
    "a quantised cache": (
        lambda b: keywords({Role.CACHE: a_quantised_cache()}),
        trio.CacheError,
        "QuantizedCache.*DynamicCache",
    ),
    "an image cut in two": (
        lambda b: {"input_ids": b["input_ids"].masked_fill(torch.arange(b["input_ids"].shape[1]) == 30, 7)},
        (trio.InputError, ValueError),
        "placeholders|do not match",
    ),
}


def a_quantised_cache():
    from transformers import cache_utils

    cache = DynamicCache()

    class Fake(cache_utils.QuantizedLayer):
        """A quantised layer without its backend, which is not installed here."""

        def __init__(self):
            cache_utils.DynamicLayer.__init__(self)

        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    cache.layers = [Fake() for _ in range(6)]
    cache.__class__ = QuantizedCache
    return cache


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.usefixtures("answers_as_before")
def test_refused_when_called(case, model):
    batch = inputs(PROMPTS)
    more, error, message = CALLS[case]
    with pipeline_for(model), pytest.raises(error, match=message), torch.no_grad():
        model(**{**batch, **more(batch)})


GENERATE = {
    "chunked prefill": ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "assisted decoding": ({"assistant_model": object()}, "assistant_model"),
    "static cache": ({"cache_implementation": "static"}, "'static'.*'dynamic'"),
    "quantised cache": ({"cache_implementation": "quantized"}, "'quantized'.*'dynamic'"),
}


@pytest.mark.parametrize("case", GENERATE)
@pytest.mark.usefixtures("answers_as_before")
def test_ways_of_generating_that_cannot_work(case, model):
    more, message = GENERATE[case]
    with pipeline_for(model), pytest.raises(trio.InputError, match=message):
        model.generate(**inputs(PROMPTS), max_new_tokens=2, **more)


@pytest.mark.usefixtures("answers_as_before")
def test_embeddings_without_ids(model):
    batch = inputs(PROMPTS)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with pipeline_for(model), pytest.raises(trio.InputError, match=r"inputs_embeds.*input_ids"):
        model(inputs_embeds=embeddings, **batch)


@pytest.mark.usefixtures("answers_as_before")
def test_non_finite_hidden_states(model):
    batch = inputs(PROMPTS)
    batch["pixel_values"] = batch["pixel_values"].clone()
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    with (
        pipeline_for(model),
        pytest.raises(trio.NonFiniteError, match=r"after layer 1.*ObjectiveGradient.*bfloat16"),
        torch.no_grad(),
    ):
        model(**batch)


@pytest.mark.usefixtures("answers_as_before")
def test_a_second_thread(model):
    batch = inputs(PROMPTS)
    entered, leave = threading.Event(), threading.Event()

    def wait(module, args):
        entered.set()
        assert leave.wait(20)

    with pipeline_for(model) as pipeline:
        handle = model.model.language_model.layers[2].register_forward_pre_hook(wait)
        first = threading.Thread(target=lambda: model(**batch))
        first.start()
        assert entered.wait(20)
        handle.remove()
        with pytest.raises(trio.InputError, match=r"another thread.*one thread at a time"):
            model(**batch)
        leave.set()
        first.join()
        assert len(pipeline.reports) == 1  # the first thread's forward went on undisturbed
        model(**batch)
        assert pipeline.reports[0] == pipeline.reports[1]


@pytest.mark.usefixtures("answers_as_before")
def test_a_cache_goes_on_only_with_its_own_pipeline(model):
    batch = inputs(PROMPTS[:1])
    follow = {"input_ids": torch.tensor([[4]]), "attention_mask": torch.ones(1, 23, dtype=torch.long)}
    with torch.no_grad():
        with pipeline_for(model, name="first"):
            cache = cache_of(model(**batch))
        with pytest.raises(trio.CacheError, match=r"'first .*1, 3.*', which is not attached any more"):
            model(**follow, **keywords({Role.CACHE: cache}))
        with pipeline_for(model, name="first"):
            cache = cache_of(model(**batch))
        with (
            pipeline_for(model, name="second"),
            pytest.raises(trio.CacheError, match=r"'first .*', but 'second .*' is attached"),
        ):
            model(**follow, **keywords({Role.CACHE: cache}))


def test_pipelines_of_one_name_are_told_apart(model):
    batch = inputs(PROMPTS[:1])
    with torch.no_grad(), trio.Pipeline(model, stages=stages((3, 4))):
        cache = cache_of(model(**batch))
    follow = {"input_ids": torch.tensor([[4]]), "attention_mask": torch.ones(1, 23, dtype=torch.long)}
    with (
        torch.no_grad(),
        trio.Pipeline(model, stages=stages((1, 4))),
        pytest.raises(trio.CacheError, match=r"stages after layers 3.*stages after layers 1"),
    ):
        model(**follow, **keywords({Role.CACHE: cache}))


def test_cropping_into_the_reduced_part(model):
    with torch.no_grad(), pipeline_for(model):
        cache = cache_of(model(**inputs(PROMPTS[:1])))
        with pytest.raises(trio.CacheError, match=r"take 5 tokens.*only the last 0"):
            cache.crop(-5)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([[[[0, 1]]]], "1 stages, the pipeline has 2"),
        ([[[[0]], [[0]]]] * 2, "2 samples, the forward brings 1"),
        ([[[[0], [1]]]] * 2, "2 images, it has 1"),
        ([[[[0, 16]]]] * 2, "between 0 and 15, found 0 to 16"),
    ],
)
def test_replay_of_indices_that_do_not_fit(selection, message, model):
    with pytest.raises(trio.InputError, match=message), pipeline_for(model).replay(selection):
        model(**inputs(PROMPTS[:1]))


def test_no_report_yet(model):
    with pytest.raises(trio.InputError, match="run a forward with an image"):
        _ = pipeline_for(model).report


def test_the_placeholder_of_the_tests_is_the_models(model):
    assert model.config.image_token_id == IMAGE_TOKEN


class OneNumber(trio.Scorer):
    """A scorer that forgets the batch."""

    def score(self, ctx):
        return torch.zeros(3)


class NoFlags(trio.Selector):
    """A selector that forgets which of its indices count."""

    def select(self, ctx):
        return torch.zeros(1, 4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)


@pytest.mark.usefixtures("answers_as_before")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scorer": OneNumber()}, r"after layer 2: the scorer OneNumber gave saliencies of shape \(3,\).*check_scorer"),
        (
            {"selector": NoFlags()},
            r"after layer 2: the selector NoFlags gave indices of shape \(1, 4\).*check_selector",
        ),
    ],
)
def test_parts_that_give_the_wrong_shape(parts, message, model):
    with trio.Pipeline(model, stages=stages((2, 4), **parts)), pytest.raises(trio.InputError, match=message):
        model(**inputs(PROMPTS))


def test_a_broken_adapter_plugin_leaves_the_others_alone(tmp_path, monkeypatch):
    info = tmp_path / "broken_vlm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-vlm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trio.adapters]\nbroken-vlm = a_module_that_is_not_there:Adapter\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="adapter 'broken-vlm' is left out.*a_module_that_is_not_there"):
        pipeline = pipeline_for(llava())
    assert pipeline.adapter_name == "llava"
