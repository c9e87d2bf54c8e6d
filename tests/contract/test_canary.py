"""On a release that was not tested, the promises are tried on a tiny model before a pipeline is attached."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

import pytest
import torch
from support.families import FAMILIES, family
from support.models import inputs, llava
from transformers.models.llama import modeling_llama

import trio
from trio.adapters import adapter_for
from trio.adapters.llava import LlavaAdapter
from trio.core import upstream
from trio.core.upstream import Role
from trio.errors import UnsupportedModelError
from trio.runtime import canary
from trio.runtime.shrink import Shrinker

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore:no adapter knows")]

STAGES = [trio.Stage(after_layer=1, keep="50%")]


@pytest.fixture
def untested(monkeypatch):
    """An installed release that is newer than the newest tested one."""
    monkeypatch.setattr(canary, "NEWEST_TESTED", "5.0.0")
    canary._remembered.cache_clear()
    yield
    canary._remembered.cache_clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_canary_that_sings_within_five_seconds(name):
    model, _ = family(name)
    adapter = adapter_for(model)
    start = time.process_time()
    verdict = canary.sing(adapter)
    assert time.process_time() - start < 5 * torch.get_num_threads()
    assert verdict is not None and not verdict.broken, verdict
    for positions in adapter.allowed_positions:
        assert f"decode equals recompute ({positions} positions)" in verdict.promises
    assert {"identity", "ragged batch equals singles", "beams", "a later turn"} <= set(verdict.promises)


def test_one_warning_a_class_and_process_then_silence(untested):
    pipeline = trio.Pipeline(llava(), stages=STAGES)
    with pytest.warns(UserWarning, match=r"newer than 5\.0\.0.*ragged batch equals singles") as said, pipeline:
        pass
    assert len([w for w in said if "newer than" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pipeline, trio.Pipeline(llava(seed=2), stages=STAGES):
            pass


def test_nothing_is_tried_on_a_tested_release(monkeypatch):
    monkeypatch.setattr(canary, "sing", lambda backbone: pytest.fail("it sang"))
    monkeypatch.setattr(canary, "NEWEST_TESTED", upstream.version())
    with trio.Pipeline(llava(), stages=STAGES):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_state_default_dtype_and_default_device_stay(untested, dtype):
    pipeline = trio.Pipeline(llava(), stages=STAGES)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        with pytest.warns(UserWarning, match="newer than"), torch.inference_mode(), pipeline:
            assert torch.get_default_dtype() is dtype
            assert torch.get_default_device().type == "meta"
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert torch.equal(torch.rand(3), expected)


def masks_forgotten(monkeypatch):
    """Attention without masks once there is a cache: padding is seen."""
    stock = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, *args, **kwargs):
        if hidden_states.shape[1] == 1:
            attention_mask = None
        return stock(self, hidden_states, position_embeddings, attention_mask, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def positions_off(monkeypatch):
    """Renumbered positions count one too many in later forwards."""
    stock = Shrinker._position_ids

    def off(self, forward, index, hidden, given):
        return stock(self, forward, index, hidden, given) + (hidden.shape[1] == 1)

    monkeypatch.setattr(Shrinker, "_position_ids", off)


def kept_by_place(monkeypatch):
    """Tokens are kept by where a sample stands in its batch."""
    stock = canary._Best.select

    def select(self, ctx):
        groups, tokens = ctx.saliency.shape
        shift = torch.arange(groups)[:, None] * torch.arange(tokens)[None]
        return stock(self, replace(ctx, saliency=ctx.saliency + 1e6 * shift))

    monkeypatch.setattr(canary._Best, "select", select)


def cache_unordered(monkeypatch):
    """A cache that does not follow the beams."""
    from trio.runtime.cache import ReducedLayer

    monkeypatch.setattr(ReducedLayer, "reorder_cache", lambda self, beams: None)


def hidden_touched(monkeypatch):
    """The runtime changes hidden states although nothing is dropped."""
    from trio.runtime.hooks import Runtime

    stock = Runtime._at_layer

    def at_layer(self, forward, index, hidden, given):
        return stock(self, forward, index, hidden, given) or (hidden + 1e-6, given)

    monkeypatch.setattr(Runtime, "_at_layer", at_layer)


def turn_forgotten(monkeypatch):
    """A later turn counts its positions from 0."""
    stock = modeling_llama.LlamaRotaryEmbedding.forward

    def forward(self, x, position_ids):
        late = position_ids[..., :1] > 20
        return stock(self, x, torch.where(late & (x.shape[1] > 1) & (x.shape[1] < 8), position_ids * 0, position_ids))

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        (hidden_touched, "identity"),
        (masks_forgotten, "decode"),
        (positions_off, "compact"),
        (kept_by_place, "singles"),
        (cache_unordered, "beams"),
        (turn_forgotten, "later turn"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_release_on_which_a_promise_breaks_is_refused_by_that_promise(untested, monkeypatch, fault, promise):
    pipeline = trio.Pipeline(llava(), stages=STAGES)
    fault(monkeypatch)
    for _ in range(2):  # the verdict is remembered, and refuses again
        with pytest.raises(UnsupportedModelError, match=rf"newer than 5\.0\.0.*promise '[^']*{promise}.*trio doctor"):
            pipeline.attach()
    assert not pipeline.attached


def test_an_adapter_without_a_tiny_model_needs_permission(untested, monkeypatch):
    class Bare(LlavaAdapter):
        """Has nothing to try."""

        @classmethod
        def tiny_config(cls, config):
            return None

    model = llava()
    pipeline = trio.Pipeline(model, stages=STAGES, adapter=Bare(model))
    for value in (None, "yes"):
        monkeypatch.delenv("TRIO_UNTESTED", raising=False)
        if value:
            monkeypatch.setenv("TRIO_UNTESTED", value)
        with pytest.raises(UnsupportedModelError, match=r"Bare has no tiny_config.*TRIO_UNTESTED=allow"):
            pipeline.attach()
    monkeypatch.setenv("TRIO_UNTESTED", "allow")
    with pipeline, torch.no_grad():
        model(**inputs([[5, "image", 6]]))
    assert pipeline.report.retention < 1


def test_releases_are_compared_by_their_numbers(monkeypatch):
    for installed, newest, untested in [
        ("5.24.0", "5.24.0", False),
        ("5.24.1", "5.24.0", True),
        ("5.100.0", "5.24.0", True),
        ("5.9.0", "5.24.0", False),
        ("6.0.0.dev0", "5.24.0", True),
    ]:
        monkeypatch.setattr(canary, "version", lambda installed=installed: installed)
        monkeypatch.setattr(canary, "NEWEST_TESTED", newest)
        assert canary.is_untested() is untested, installed


def test_the_names_that_were_found_are_told():
    found = adapter_for(llava()).upstream.describe()
    assert found["transformers"] == upstream.version()
    assert (
        upstream.cache_name() in found["cache argument"] and upstream.NAMES[Role.ROTARY][0] in found["rotary argument"]
    )
