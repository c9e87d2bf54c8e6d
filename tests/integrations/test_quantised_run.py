"""Weights quantised by the libraries themselves (`make quantised`), on a trained model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import trio
from benchmarks.half import one_of_each
from benchmarks.quantised import CHECKED, KINDS, Said, ask, load, same
from trio import zoo
from trio.adapters.quantised import WORKING
from trio.measure.evaluation import LabelledSample
from trio.testing import check_adapter

BY_NAME = {kind.name: kind for kind in KINDS}
DYNAMIC = "torchao int8, dynamic activations"
PROMPTS = 12


@cache
def unquantised() -> tuple[list[LabelledSample], Said]:
    """The prompts, and what the model says as it is."""
    torch.set_num_threads(1)
    model, processor = load(None)
    samples = one_of_each(model, PROMPTS)
    return samples, ask(model, processor, samples)


@cache
def loaded(name: str) -> tuple[Any, Any]:
    return load(BY_NAME[name])


@pytest.mark.parametrize("name", WORKING)
def test_answers_are_those_of_the_unquantised_model(name: str) -> None:
    samples, expected = unquantised()
    found = ask(*loaded(name), samples)
    assert not found.refused
    assert same(found.full, expected.full) >= PROMPTS - 1
    assert same(found.compressed, expected.compressed) >= PROMPTS - (2 if name == "bitsandbytes nf4" else 1)


@pytest.mark.parametrize("name", WORKING)
def test_promises(name: str) -> None:
    promises = [one for one in CHECKED if (name, one) != ("bitsandbytes int8", "batch")]  # see docs/support.md
    check_adapter(*loaded(name), promises=promises, tolerance=BY_NAME[name].tolerance)


def test_dynamic_activations_are_refused_with_their_name_and_what_works() -> None:
    model, _ = loaded(DYNAMIC)
    with pytest.raises(trio.UnsupportedModelError, match="as in dynamic-activation int8") as refused:
        trio.Pipeline.from_spec("trio-soft-11", model)
    said = str(refused.value)
    assert "torchao Int8DynamicActivationInt8WeightConfig" in said
    assert all(works in said for works in WORKING)


def test_dynamic_activations_are_known_without_a_configuration() -> None:
    """`quantize_` leaves nothing in the configuration: the class of the weights is named."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, _ = zoo.load("tiny-llava", dtype=torch.float32)
    quantize_(model.model.language_model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(trio.UnsupportedModelError, match="as in dynamic-activation int8") as refused:
        trio.Pipeline.from_spec("trio-soft-11", model)
    weight = model.model.language_model.layers[3].self_attn.q_proj.weight
    assert type(weight).__name__ in str(refused.value)
