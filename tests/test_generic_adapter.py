"""The generic adapter: where one image ends and the next begins, and why a model is refused."""

from __future__ import annotations

import re
import traceback

import pytest
import torch
import transformers
from support.families import IMAGE_TOKEN, VIDEO_TOKEN, family
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import trio
from trio.adapters import adapter_for
from trio.adapters.generic import why_not
from trio.core.backbone import FEATURE_COUNTS
from trio.core.prompts import Prompt
from trio.measure.evaluation.images import Counter

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore:no adapter knows")]


def tokens_of(layout):
    return [[image.tokens for image in sample] for sample in layout.images]


def counted(*rows, **more):
    return {FEATURE_COUNTS: rows, **more}


# Where images end


@pytest.mark.parametrize("name", ["mistral3", "vipllava", "smolvlm", "glm4v"])
def test_neighbouring_images_keep_as_many_tokens_each(name):
    """Side by side, and with a single word in between."""
    model, make = family(name)
    prompts = [Prompt("what differs", 1, 2, "here"), Prompt("what differs", 1, "and", 2, "here"), Prompt("see", 3)]
    with trio.Pipeline(model, stages=[trio.Stage(after_layer=2, keep=2)]) as pipeline, torch.no_grad():
        model(**make(prompts))
    kept = [[group.kept for group in sample.stages[0].groups] for sample in pipeline.report.samples]
    assert kept == [[2, 2], [2, 2], [2]]


@pytest.mark.parametrize("gap", [[], [7], [7, 8, 9]])
def test_images_end_where_the_encoder_says(gap):
    adapter = adapter_for(family("mistral3")[0])
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 4, *gap, *[IMAGE_TOKEN] * 6, 5]])
    layout = adapter.layout(ids, {"image": counted(4, 6)})
    assert tokens_of(layout) == [[4, 6]] and layout.modalities == (("image", "image"),)
    assert int(layout.visual.sum()) == 10 and not any(image.placed for image in layout.images[0])
    assert adapter.encoded_images(layout.images[0], counted(4, 6)) == 2


def test_rows_with_break_tokens_are_one_image():
    ids = torch.tensor([[1, *[IMAGE_TOKEN, IMAGE_TOKEN, 92] * 3, 5]])
    assert tokens_of(adapter_for(family("mistral3")[0]).layout(ids, {"image": counted(6)})) == [[6]]


def test_beams_repeat_samples_after_their_images_were_encoded():
    row, other = [IMAGE_TOKEN] * 2 + [5] + [IMAGE_TOKEN] * 3, [5, 5] + [IMAGE_TOKEN] * 4
    ids = torch.tensor([row, row, row, other, other, other])
    layout = adapter_for(family("mistral3")[0]).layout(ids, {"image": counted(2, 3, 4)})
    assert tokens_of(layout) == [[2, 3]] * 3 + [[4]] * 3


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([IMAGE_TOKEN] * 9, r"9 with id 99, the encoded images give 10 tokens.*whole images"),
        ([5] * 9, r"0 with id 99, the encoded images give 10 tokens"),
    ],
)
def test_placeholders_that_do_not_fit_are_refused(rows, reason):
    with pytest.raises(trio.InputError, match=reason):
        adapter_for(family("mistral3")[0]).layout(torch.tensor([rows]), {"image": counted(4, 6)})


def test_a_sample_that_ends_within_an_image_is_refused():
    ids = torch.tensor([[IMAGE_TOKEN] * 5, [IMAGE_TOKEN] * 5])
    with pytest.raises(trio.InputError, match=r"sample 0: its 5 placeholders .* end within an image"):
        adapter_for(family("mistral3")[0]).layout(ids, {"image": counted(4, 6)})


def test_images_whose_rows_are_not_known_are_refused():
    adapter, ids = adapter_for(family("mistral3")[0]), torch.tensor([[IMAGE_TOKEN] * 4])
    with pytest.raises(trio.InputError, match=r"where one ends and the next begins is not known.*add-an-adapter"):
        adapter.layout(ids, {"image": {"pixel_values": (1, 3, 16, 16)}})
    with pytest.raises(trio.InputError, match=r"give 0 tokens.*while the pipeline was not attached: pass pixels"):
        adapter.layout(ids, {})


def test_encoders_are_those_that_the_model_has():
    assert adapter_for(family("mistral3")[0]).encoders == {"image": "get_image_features"}
    glm = adapter_for(family("glm4v")[0])
    assert glm.encoders == {"image": "get_image_features", "video": "get_video_features"}
    assert glm.pixels == ("pixel_values", "pixel_values_videos")


def test_a_video_under_its_own_placeholder_and_under_the_images():
    adapter = adapter_for(family("glm4v")[0])
    image, video = [IMAGE_TOKEN] * 4, [VIDEO_TOKEN] * 3
    both = {"image": counted(4), "video": counted(6)}
    layout = adapter.layout(torch.tensor([[*video, 7, *video, 5, *image]]), both)
    assert tokens_of(layout) == [[6, 4]] and layout.modalities == (("video", "image"),)
    layout = adapter.layout(torch.tensor([[5, *image, 7, *image[:2]]]), {"video": counted(6)})
    assert tokens_of(layout) == [[6]] and layout.modalities == (("video",),)
    with pytest.raises(trio.InputError, match=r"images and videos share the id 99.*separate prompts"):
        adapter.layout(torch.tensor([[*image, 7, *image, 5, *image[:2]]]), both)


def test_a_glm_video_is_reduced():
    model, _ = family("glm4v")
    frame = [94, *[IMAGE_TOKEN] * 8, 95]
    ids = torch.tensor([[1, 5, *frame, *frame, 7, 8, 9]])
    grid = torch.tensor([[2, 4, 8]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(64, 96, generator=torch.Generator().manual_seed(3)),
        "video_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long() * 2,
    }
    with trio.Pipeline(model, stages=[trio.Stage(after_layer=2, keep=5)]) as pipeline, torch.no_grad():
        model(**batch)
    sample = pipeline.report.samples[0]
    assert (sample.visual_tokens, sample.stages[0].kept) == (16, 5)


def test_images_of_a_sample_in_one_tensor_are_told_apart_by_their_fixed_number_of_rows():
    """SmolVLM, from transformers 5.23 on: a tensor for each sample, whatever images it has."""
    adapter = adapter_for(family("smolvlm")[0])
    one = [IMAGE_TOKEN] * 16
    ids = torch.tensor([[*one, 92, *one, 5], [5, 5, *one, *one]])
    layout = adapter.layout(ids, {"image": counted(32, 32)})
    assert tokens_of(layout) == [[16, 16], [16, 16]]
    assert adapter.encoded_images([image for sample in layout.images for image in sample], counted(32, 32)) == 4
    with pytest.raises(trio.InputError, match="each image takes 16"):
        adapter.layout(ids[:, 1:], {"image": counted(32, 32)})


@pytest.mark.parametrize("name", ["mistral3", "smolvlm", "glm4v", "llava-next"])
def test_tokens_are_counted_before_any_encoder_ran(name):
    """As evaluations do for images of many sizes; what is no image (newlines) does not count."""
    model, make = family(name)
    batch = make([Prompt("what differs", 1, 2, "here"), Prompt("no picture")])
    with trio.Pipeline(model, stages=[trio.Stage(after_layer=2, keep=2)]) as pipeline, torch.no_grad():
        model(**batch)
    assert Counter(adapter_for(model), None).of_batch(batch) == [s.visual_tokens for s in pipeline.report.samples]


# Why models are refused

#: Classes of which a default configuration builds no model, with what is missing.
MISSING = {
    "AyaVisionForConditionalGeneration": {"vision_config": {"model_type": "siglip_vision_model"}},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 4}},
    "CohereCompassForConditionalGeneration": {
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
        }
    },
    "DeepseekOcr2ForConditionalGeneration": {"text_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 4}},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "PerceptionLMForConditionalGeneration": {
        "vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 1024}}
    },
    "Qwen4ExpForConditionalGeneration": {
        "text_config": {
            "indexer_head_dim": 256,
            "indexer_compress_ratio": 4,
            "indexer_budget": 64,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
        }
    },
}
CLASSES = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()))
#: What a reason names: an attribute, a method, a kind of layer, or how the class is built.
CONCRETE = re.compile(
    r"^it is an encoder-decoder$"
    r"|^it has no inner `model` "
    r"|^its inner model has no `get_image_features`$"
    r"|^its inner model has no text decoder under language_model or text_model$"
    r"|^its configuration has no `image_token_id`"
    r"|^its text decoder has no `(layers|norm|rotary_emb)`$"
    r"|^it builds attention masks .*above its decoder"
    r"|^its rotary embeddings depend on more than positions \(\w+\)$"
    r"|^its language model takes visual features for its inner layers \(.+\)$"
    r"|^its decoder has layers of other kinds than full attention \(.+\)$"
)


def without_weights(name):
    """A model of a class, on the meta device."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**MISSING.get(name, {})))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_served_or_refused_with_what_it_lacks(name):
    try:
        model = without_weights(name)
    except Exception as failed:  # an older release's class whose own default configuration does not build
        frames = traceback.extract_tb(failed.__traceback__)
        assert transformers.__version__ < "5.23" and "/trio/" not in frames[-1].filename
        return
    reasons = why_not(model)
    assert all(CONCRETE.search(reason) for reason in reasons)
    own = [
        adapter
        for adapter in trio.ADAPTERS.names()
        if adapter != "generic" and trio.ADAPTERS.get(adapter).matches(model)
    ]
    if own:
        assert adapter_for(model).__class__ is trio.ADAPTERS.get(own[0])
    elif reasons:
        with pytest.raises(trio.UnsupportedModelError) as refused:
            adapter_for(model)
        assert name in str(refused.value) and all(reason in str(refused.value) for reason in reasons)
        assert "docs/add-an-adapter.md" in str(refused.value)
    else:
        assert adapter_for(model).encoders["image"] == "get_image_features"


REFUSED = {
    "Molmo2ForConditionalGeneration": r"attention masks from token types \(mm_token_type_ids\), above its decoder",
    "Step3p7ForConditionalGeneration": r"rotary embeddings depend on more than positions \(layer_type\)",
    "Granite4VisionForConditionalGeneration": r"features for its inner layers \(vision_mask, deepstack_features\)",
    "Blip2ForConditionalGeneration": r"no inner `model` that merges text and images",
    "MllamaForConditionalGeneration": r"no `get_image_features`",
    "LlamaForCausalLM": r"no `get_image_features`.*no `image_token_id`",
    "Florence2ForConditionalGeneration": r"encoder-decoder",
}


#: Its default configuration builds from transformers 5.18 on.
LATER = {"Granite4VisionForConditionalGeneration"} if transformers.__version__ < "5.18" else set()


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(transformers, name) and name not in LATER])
def test_refused_when_the_pipeline_is_built_with_the_true_reason(name):
    with pytest.raises(trio.UnsupportedModelError, match=rf"{name}.*{REFUSED[name]}.*add-an-adapter"):
        trio.Pipeline.from_spec("trio-11", without_weights(name))


def test_what_is_no_transformers_model_is_refused_as_such():
    with pytest.raises(trio.UnsupportedModelError, match=r"Linear.*no transformers model"):
        adapter_for(nn.Linear(2, 2))
