"""Every promise on every language model, tower, dtype and attention implementation: each pair of them at least once."""

from __future__ import annotations

import pytest
import torch
from support.bench import TOKENS
from support.features import features_of
from support.models import llava

from trio.testing import check_adapter, varlen

pytestmark = pytest.mark.contract

F32, BF16 = torch.float32, torch.bfloat16
MODELS = [
    ("llama", "clip", F32, "eager"),
    ("llama", "siglip", BF16, "sdpa"),
    ("llama", "clip", F32, varlen.NAME),
    ("mistral", "siglip", F32, "eager"),
    ("mistral", "clip", BF16, varlen.NAME),
    ("mistral", "clip", F32, "sdpa"),
    ("qwen2", "clip", BF16, "eager"),
    ("qwen2", "siglip", F32, "sdpa"),
    ("qwen2", "siglip", BF16, varlen.NAME),
    ("qwen3", "siglip", BF16, "eager"),
    ("qwen3", "clip", F32, "sdpa"),
    ("qwen3", "siglip", F32, varlen.NAME),
]


def test_every_pair_is_there():
    for first in range(4):
        for second in range(first + 1, 4):
            wanted = {(a[first], b[second]) for a in MODELS for b in MODELS}
            assert {(model[first], model[second]) for model in MODELS} == wanted


@pytest.mark.parametrize(("text", "tower", "dtype", "attention"), MODELS)
def test_all_promises(text, tower, dtype, attention):
    with varlen.registered():
        model = llava(text, tower, dtype=dtype, attention=attention)
        results = check_adapter(model, TOKENS)
    assert len(results) > 50


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_flex_attention(text, support):
    """Its block masks, computed without compiling: inductor's CPU kernels take minutes, and those of torch 2.15 for a
    growing cache do not compile at all, on the stock model either."""
    with torch.compiler.set_stance("force_eager"):
        found = check_adapter(llava(text, "clip"), TOKENS, attention=["flex_attention"], promises=["attention"])
        support("llava", "random", features_of(found))
        model = llava(text, "clip", attention="flex_attention")
        check_adapter(model, TOKENS, promises=["identity", "decode", "batch"])
