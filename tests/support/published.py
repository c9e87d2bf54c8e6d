"""The inputs on which published code was run for `tests/fixtures/published`, made again from their seeds.

numpy's `RandomState` gives the same stream in every version and on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trio import zoo
from trio.core.images import batch_for
from trio.measure.evaluation import shapesvqa
from trio.measure.shapesvqa.task import canvas_for

PATCHES = 576


def normal(seed: int, *shape: int) -> torch.Tensor:
    """float32 standard normal numbers."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def attention_of(seed: int, heads: int, n: int) -> torch.Tensor:
    """float32 ``(heads, n)``, rows that sum to 1."""
    return normal(seed, heads, n).softmax(-1)


def marked(features: torch.Tensor) -> torch.Tensor:
    """Features ``(n, D)`` with n small numbers more, one for each token: an average tells of what it is made."""
    return torch.cat([features, 1e-3 * torch.eye(len(features))], 1)


def groups_of(averages: torch.Tensor) -> list[int]:
    """For each of the n tokens the one of the averages ``(m, D + n)`` of marked features that holds it."""
    n = averages.shape[0]
    into = (averages[:, -tokens_of(averages) :].abs() > 1e-7).float()
    assert bool((into.sum(0) == 1).all()), f"{n} averages do not hold each token once"
    return into.argmax(0).tolist()


#: Dimensions of features before the marks.
WIDTH = 32


def tokens_of(averages: torch.Tensor) -> int:
    """How many tokens were marked."""
    return averages.shape[1] - WIDTH


def visionzip_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token's attention by head ``(16, 576)`` and keys ``(576, 16, 8)``."""
    return attention_of(1000 + seed, 16, PATCHES), normal(1100 + seed, PATCHES, 16, 8)


def scan_inputs(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention by head in a shallow and in a deep block ``(16, n)``, and features after the projector."""
    return (
        attention_of(1200 + seed, 16, n),
        attention_of(1300 + seed, 16, n),
        marked(normal(1400 + seed, n, WIDTH)),
    )


def vispruner_inputs(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token's attention by head ``(16, n)`` and features ``(n, 32)``."""
    return attention_of(4000 + seed, 16, n), normal(5000 + seed, n, WIDTH)


def features_of(seed: int, n: int) -> torch.Tensor:
    """Features ``(n, 32)``."""
    return normal(1700 + seed, n, WIDTH)


def prumerge_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token's query ``(576,)`` and the patches' keys ``(576, 576)``, all heads in a row."""
    return 1.5 * normal(1800 + seed, PATCHES), normal(1900 + seed, PATCHES, PATCHES)


def nms_inputs(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Saliency ``(n,)`` and features ``(n, 32)`` in a dozen clusters, so that many tokens are near another one."""
    random = np.random.RandomState(2000 + seed)
    middles, noise = random.standard_normal((12, WIDTH)), random.standard_normal((n, WIDTH))
    features = middles[random.randint(12, size=n)] + 0.45 * noise
    return torch.from_numpy(random.random_sample(n).astype(np.float32)), torch.from_numpy(features.astype(np.float32))


def stage_model(seed: int, *, layers: int = 4, side: int = 12) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny LLaVA with every weight drawn from the seed, and one prompt with an image of side x side tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=4 * side,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=99,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    random = np.random.RandomState(2100 + seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.from_numpy(random.standard_normal(tuple(weight.shape)).astype(np.float32))
            scale = 0.05 if weight.ndim < 2 else 0.5 if "vision_tower" in name else 0.15
            weight.copy_(scale * drawn + ("norm" in name and name.endswith("weight")))
    ids = [1, *random.randint(3, 98, 5), *[99] * side**2, *random.randint(3, 98, 9)]
    pixels = torch.from_numpy(random.standard_normal((1, 3, 4 * side, 4 * side)).astype(np.float32))
    input_ids = torch.tensor([[int(one) for one in ids]])
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}
    return model.eval(), batch


def tome_inputs(seed: int, step: int, n: int) -> torch.Tensor:
    """What tokens are compared by in one of several merges in a row, ``(1, n, 16)``."""
    return normal(6000 + 100 * seed + step, 1, n, 16)


def forward_inputs(name: str, prompt: int) -> tuple[Any, dict[str, Any]]:
    """A model in float32 and a prompt: ``drawn`` has the depth and the tokens of LLaVA-1.5, others are the zoo's, with
    the first question about a test scene of ShapesVQA."""
    if name == "drawn":
        return stage_model(prompt, layers=32, side=24)
    model, processor = zoo.load(name)
    task = shapesvqa("test", limit=prompt + 1, canvas=canvas_for(model))
    sample = next(one for one in task.samples if one.scene == prompt)
    return model.float(), dict(batch_for(processor, [([sample.load()], sample.question)]))
