"""The promises on specs, batches, prompts and images that hypothesis draws."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bench import bench
from support.models import llava

import trio
from trio.testing import Prompt
from trio.testing.bench import Setting
from trio.testing.promises.batch import singles
from trio.testing.promises.decode import decoded

pytestmark = pytest.mark.contract

LAYERS = 6
WORDS = st.lists(
    st.sampled_from(["what", "is", "the", "red", "thing", "left", "of", "it", "?"]), min_size=1, max_size=7
)
#: A word first, so that no prompt is empty; then words and images in any order.
PARTS = st.lists(st.one_of(WORDS.map(" ".join), st.integers(1, 9)), max_size=4)
PROMPTS = st.builds(lambda word, rest: Prompt(word, *rest), WORDS.map(" ".join), PARTS)
BATCHES = st.lists(PROMPTS, min_size=1, max_size=4).filter(lambda batch: any(p.images for p in batch))
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@cache
def model(text):
    return llava(text)


@st.composite
def specs(draw):
    layers = sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=3)))
    per = draw(st.sampled_from(["image", "sample"]))
    stages = []
    for layer in layers:
        scorers = [
            name
            for name in trio.SCORERS.names()
            if layer > 0 or not trio.SCORERS.build(name).required() & {"ran", "last"}
        ]
        share = draw(st.sampled_from(["7%", "30%", "50%", "80%", "100%"]))
        stages.append(
            {
                "after_layer": layer,
                "keep": {"share": share, "of": "current", "per": per},
                "scorer": draw(st.sampled_from(scorers)),
                "selector": draw(st.sampled_from(trio.SELECTORS.names())),
            }
        )
    return Setting("drawn", stages, draw(st.sampled_from(["compact", "original"])))


@EXAMPLES
@given(specs(), BATCHES, st.sampled_from(["left", "right"]), st.sampled_from(["llama", "qwen3"]))
def test_a_batch_keeps_what_its_samples_keep_alone(setting, prompts, side, text):
    singles(bench(model(text)), setting, side, prompts)


@EXAMPLES
@given(specs(), BATCHES, st.sampled_from(["llama", "mistral"]))
def test_decoding_equals_one_pass(setting, prompts, text):
    decoded(bench(model(text)), setting, prompts)


@EXAMPLES
@given(specs(), BATCHES, st.sampled_from(["left", "right"]))
def test_what_is_reported_is_what_ran(setting, prompts, side):
    """Counts by layer add up, indices are real and nested, and the model is bitwise as before afterwards."""
    work = bench(model("llama"))
    inputs = work.inputs(*prompts, side=side)
    before = work.forward(inputs)
    pipeline = work.pipeline(setting)
    with pipeline:
        logits = work.forward(inputs)
    report = pipeline.report
    assert torch.equal(work.forward(inputs), before)
    assert logits.shape[1] == report.layer_lengths[-1] == max(tokens[-1] for tokens in report.layer_tokens)
    for number, prompt in enumerate(prompts):
        sample = report.samples[number]
        assert sample.visual_tokens == 16 * len(prompt.images)
        text = int(inputs["attention_mask"][number].sum()) - sample.visual_tokens
        assert report.layer_tokens[number] == [text + visual for visual in sample.visual_by_layer(LAYERS)]
        whole = [set(range(16)) for _ in prompt.images]
        for stage in range(len(sample.stages)):
            kept = [set(indices) for indices in sample.kept_of_images(stage)]
            assert all(now <= then for now, then in zip(kept, whole, strict=True))
            whole = kept
        for stage in sample.stages:
            assert all(group.kept == min(group.asked, group.tokens_in) for group in stage.groups)
