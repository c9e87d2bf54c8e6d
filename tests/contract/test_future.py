"""Releases that do not exist yet: what is called in another way is refused by name, and nothing answers wrongly."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from support.future import STAND_INS, EncodedAhead, Future
from support.models import IMAGE_TOKEN, inputs, llava
from transformers import masking_utils
from transformers.generation.utils import GenerationMixin

import trio
from trio.core import upstream
from trio.core.upstream import DynamicLayer, Role, keywords
from trio.errors import CacheError, InputError, TrioError, UnsupportedModelError
from trio.spec import PartSpec

pytestmark = pytest.mark.contract

SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
STAGES = [trio.Stage(after_layer=1, keep="50%"), trio.Stage(after_layer=3, keep="25%")]
PROMPTS = {
    "one image": inputs([[5, "image", 6, 7]]),
    "ragged": inputs([[5, "image", 6, 7], [8, "image", "image", 9, 10, 11], [12, 13, 14]]),
}


def generated(model, batch, **more):
    return model.generate(**batch, **SETTINGS, **more)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_stand_ins_frame_itself_is_served(positions):
    """Another class that is called in the known way: the frame of the stand-ins is not what is refused."""
    stock, future = llava(), Future(llava()).model
    for batch in PROMPTS.values():
        with (
            trio.Pipeline(stock, stages=STAGES, positions=positions),
            trio.Pipeline(future, stages=STAGES, positions=positions),
        ):
            assert torch.equal(generated(future, batch), generated(stock, batch))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("batch", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("scorer", ["objective-gradient", "random"])
@pytest.mark.parametrize("kind", STAND_INS, ids=lambda kind: kind.__name__)
def test_what_is_called_in_another_way_is_refused_by_name(kind, scorer, batch, cached):
    """`random` looks into no layer, so that nothing is tried before the first call."""
    stages = [stage.model_copy(update={"scorer": PartSpec(name=scorer)}) for stage in STAGES]
    stock = generated(llava(), batch)
    model = kind(llava()).model
    assert torch.equal(generated(model, batch), stock), "the stand-in is wrong without a pipeline"
    compressed = llava()
    with trio.Pipeline(compressed, stages=stages):
        right = generated(compressed, batch, **keywords({Role.USE_CACHE: cached}))
    try:
        pipeline = trio.Pipeline(model, stages=stages)
        with pipeline:
            answer = generated(model, batch, **keywords({Role.USE_CACHE: cached}))
    except (UnsupportedModelError, CacheError, InputError) as refused:
        said = str(refused)
        assert isinstance(refused, (CacheError, InputError)) or ("transformers" in said and "trio doctor" in said), said
    else:
        # Without a cache, what a stand-in does with caches plays no part.
        assert not cached and "Cache" in kind.__name__ + kind.__doc__, "not refused"
        assert torch.equal(answer, right), "an answer that differs from the known releases'"
    assert torch.equal(generated(model, batch), stock), "the model is not as before"


def test_cached_answers_of_every_stand_in_are_refused_and_say_where():
    """Each by `UnsupportedModelError` or `CacheError`, with what was looked for, the version and what to do."""
    for kind in STAND_INS:
        model = kind(llava()).model
        with (
            pytest.raises((UnsupportedModelError, CacheError, InputError)) as refused,
            trio.Pipeline(model, stages=STAGES),
        ):
            generated(model, PROMPTS["one image"])
        if isinstance(refused.value, UnsupportedModelError):
            assert upstream.version() in str(refused.value) and "trio doctor" in str(refused.value), kind


def test_features_that_were_encoded_ahead_and_come_under_another_name_are_refused():
    model = EncodedAhead(llava()).model
    batch = PROMPTS["one image"]
    assert torch.equal(generated(model, batch), generated(llava(), batch))
    ahead = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")  # 5.17 encodes within the forward
    expected = pytest.raises(UnsupportedModelError, match="encoded") if ahead else contextlib.nullcontext()
    with trio.Pipeline(model, stages=STAGES) as pipeline, expected:
        generated(model, batch)
    assert ahead or pipeline.report.retention < 1


@pytest.mark.parametrize("name", ["crop", "get_mask_sizes", "reorder_cache", "update"])
def test_a_cache_layer_that_lacks_a_method_is_refused_when_the_pipeline_is_built(monkeypatch, name):
    for owner in DynamicLayer.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    monkeypatch.setattr(DynamicLayer, "__abstractmethods__", frozenset())
    with pytest.raises(UnsupportedModelError, match=f"DynamicLayer.*`{name}`"):
        trio.Pipeline(llava(), stages=STAGES)


def test_a_cache_layer_that_wants_more_is_refused(monkeypatch):
    monkeypatch.setattr(DynamicLayer, "crop", lambda self, tokens, mode: None)
    with pytest.raises(UnsupportedModelError, match=r"DynamicLayer\.crop"):
        trio.Pipeline(llava(), stages=STAGES)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda config, inputs_embeds, attention_mask, kv, position_ids, layer_idx, and_mask_function: 0, "cache"),
        (lambda config, inputs_embeds, attention_mask, cache, position_ids, and_mask_function: 0, "layer_idx"),
        (lambda **everything: 0, "config"),
    ],
    ids=["cache renamed", "no layer", "only keywords"],
)
def test_a_mask_function_with_other_arguments_is_refused(monkeypatch, forward, says):
    monkeypatch.setattr(masking_utils, "create_causal_mask", forward)
    with pytest.raises(UnsupportedModelError, match=says):
        trio.Pipeline(llava(), stages=STAGES)


@pytest.mark.parametrize("change", ["too long", "an object"])
def test_a_mask_of_another_shape_is_refused_while_it_is_made(monkeypatch, change):
    stock = masking_utils.create_causal_mask
    monkeypatch.setattr(masking_utils, "create_causal_mask", stock)
    model = llava(attention="eager")

    def other(*args, **kwargs):
        mask = stock(*args, **kwargs)
        return [mask] if change == "an object" else torch.cat([mask, mask[..., :1]], -1)

    other.__signature__ = inspect.signature(stock)
    with trio.Pipeline(model, stages=STAGES):
        monkeypatch.setattr(masking_utils, "create_causal_mask", other)
        with pytest.raises(UnsupportedModelError, match="create_causal_mask"), torch.no_grad():
            model(**PROMPTS["ragged"])


@pytest.mark.parametrize("name", [upstream.LOOKUP, upstream.CHUNK, upstream.CACHE_KIND])
def test_a_way_of_generating_that_cannot_be_seen_is_refused(monkeypatch, name):
    class Renamed(upstream.GenerationConfig):
        def __init__(self):
            super().__init__()
            vars(self)["renamed_" + name] = vars(self).pop(name)

    monkeypatch.setattr(upstream, "GenerationConfig", Renamed)
    with pytest.raises(UnsupportedModelError, match=name):
        trio.Pipeline(llava(), stages=STAGES)


def test_a_release_whose_caches_have_moved_says_so_when_it_is_imported(tmp_path):
    import subprocess
    import sys

    code = (
        "import transformers, sys\n"
        "import transformers.cache_utils as c\n"
        "del c.DynamicLayer\n"
        "from trio.errors import UnsupportedModelError\n"
        "try:\n"
        "    import trio.core.upstream\n"
        "except UnsupportedModelError as error:\n"
        "    assert 'DynamicLayer' in str(error) and transformers.__version__ in str(error), error\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 7


def test_a_users_cache_under_either_name():
    """`generate(cache=...)` where the release takes it, and `past_key_values=...`, which 5.24 announces to go."""
    batch = PROMPTS["ragged"]
    model = llava()
    with trio.Pipeline(model, stages=STAGES):
        expected = generated(model, batch)
        assert torch.equal(generated(model, batch, **keywords({Role.CACHE: upstream.dynamic_cache()})), expected)
        if upstream.cache_name() == "cache":
            with pytest.warns(FutureWarning, match="past_key_values"):
                assert torch.equal(generated(model, batch, past_key_values=upstream.dynamic_cache()), expected)
            with torch.no_grad():
                whole = model(**batch).logits
                with pytest.warns(FutureWarning, match="past_key_values"):
                    cache = upstream.dynamic_cache()
                    assert torch.equal(model(**batch, past_key_values=cache).logits, whole)
        layers = cache.layers if upstream.cache_name() == "cache" else upstream.dynamic_cache().layers
        lengths = {layer.keys.shape[-2] for layer in layers}
        assert len(lengths) in (0, 3)


def test_a_forward_that_answers_is_checked_against_the_plan(monkeypatch):
    """A decode step whose keys do not arrive is refused in that step."""
    model = llava()
    batch = PROMPTS["one image"]
    with trio.Pipeline(model, stages=STAGES), torch.no_grad():
        cache = upstream.cache_of(model(**batch))
        layer = cache.layers[4]
        monkeypatch.setattr(type(layer), "update", lambda self, keys, values, *a, **k: (keys, values))
        step = {Role.IDS: torch.tensor([[7]]), Role.CACHE: cache}
        with pytest.raises((CacheError, RuntimeError)) as refused:
            model(**keywords(step))
        assert isinstance(refused.value, TrioError), refused.value
