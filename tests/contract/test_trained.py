"""The promises on the trained models that ship with the package, through their own processors."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.bench import bench
from support.features import features_of

import trio
from trio.testing import ProcessorInputs, Prompt, check_adapter
from trio.testing.bench import Bench
from trio.testing.inputs import draw_image

pytestmark = pytest.mark.contract


@cache
def trained(dtype=torch.float32):
    model, processor = trio.zoo.load("tiny-llava")
    return model.to(dtype).eval(), processor


@pytest.mark.parametrize(
    "promise", ["identity", "reversibility", "decode", "batch", "attention", "generation", "nothing-lost"]
)
def test_promises(promise, support):
    results = check_adapter(*trained(), promises=[promise])
    support("llava", "trained", features_of(results))


@pytest.mark.parametrize("name", [name for name in trio.zoo.names() if name != "tiny-llava"])
def test_promises_on_images_of_many_sizes(name, support):
    results = check_adapter(*trio.zoo.load(name), promises=["decode", "batch"])
    support(name.removeprefix("tiny-"), "trained", features_of(results))


@pytest.mark.parametrize("name", trio.zoo.names())
def test_promises_with_a_compressor(name, support):
    results = check_adapter(*trio.zoo.load(name), compressor="visionzip", promises=["batch"])
    support(name.removeprefix("tiny-"), "trained", {"compressor": features_of(results)["batch"]})


@pytest.mark.parametrize("promise", ["identity", "reversibility", "decode", "batch", "attention"])
def test_promises_in_half_precision(promise):
    check_adapter(*trained(torch.bfloat16), promises=[promise])


def test_the_text_pipeline_of_transformers():
    """`pipeline("image-text-to-text")`: the same answer as generate, and the model as before afterwards."""
    from transformers import pipeline as transformers_pipeline

    model, processor = trained()
    ask = transformers_pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": draw_image(3)}, {"type": "text", "text": "how many shapes ?"}]
    messages = [{"role": "user", "content": content}]
    given = {"max_new_tokens": 3, "do_sample": False}
    before = ask(text=messages, generate_kwargs=given)
    with trio.Pipeline.from_spec("trio-11", model) as compress:
        found = ask(text=messages, generate_kwargs=given)
        assert compress.report.retention < 0.12
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, **given)[0, inputs["input_ids"].shape[1] :]
    answer = found[0]["generated_text"]
    answer = answer if isinstance(answer, str) else answer[-1]["content"]
    assert answer.strip() == processor.decode(tokens, skip_special_tokens=True).strip()
    assert ask(text=messages, generate_kwargs=given) == before


def test_half_precision_keeps_nearly_the_same_tokens():
    """Batches against singles and eager against sdpa, in bfloat16, one stage, twenty images.

    Some differ (docs/testing.md has figures), and other processors round differently: 95% is what `check_adapter`
    allows.
    """
    model, processor = trained(torch.bfloat16)
    work: Bench = bench(model)
    work = Bench(**{**vars(work), "factory": ProcessorInputs(processor)})
    pipeline = trio.Pipeline(model, stages=[{"after_layer": "50%", "keep": "25%"}])
    common = total = 0
    for first in range(0, 20, 4):
        prompts = [Prompt("What colour is" + " the thing" * number, first + number, "?") for number in range(4)]
        with pipeline:
            work.forward(work.inputs(*prompts))
            together = pipeline.report.selection()[0]
            for number, prompt in enumerate(prompts):
                work.forward(work.inputs(prompt))
                (alone,) = pipeline.report.selection()[0]
                common += len(set(alone[0]) & set(together[number][0]))
                total += len(alone[0])
    assert total == 720
    assert common / total >= 0.95
