"""What engines are asked, and what `trio.Pipeline` on transformers answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from ...core.images import prompt_for
from ...pipeline import Pipeline

#: Shares of the tokens, compressors and newlines that requests ask for beside the engine's own spec.
SPECS: tuple[dict[str, Any], ...] = (
    {"compressor": {"name": "divprune", "keep": "33.3%"}, "positions": "auto", "newlines": "always"},
    {"compressor": {"name": "uniform-grid", "keep": "25%"}, "positions": "auto", "newlines": "never"},
    {"compressor": {"name": "average-pool", "keep": 12}, "positions": "auto", "newlines": "always"},
)
#: The same of compressors that read the tower.
READING: tuple[dict[str, Any], ...] = (
    {"compressor": {"name": "visionzip", "keep": "25%"}, "positions": "auto", "newlines": "never"},
    {
        "compressor": {"name": "scan", "keep": 20, "local_layer": 0, "window": 4, "limit": "ceil"},
        "positions": "auto",
        "newlines": "always",
    },
    {"compressor": {"name": "vispruner", "keep": "20%"}, "positions": "auto", "newlines": "never"},
    {"compressor": {"name": "prumerge", "share": 0.1, "layer": -2}, "positions": "auto", "newlines": "never"},
)
#: Height and width of the images, as shares of the given one's sides.
SIZES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (1.7, 0.9), (0.8, 2.1), (0.3, 0.3))


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        question: the user's words.
        images: in order; none for text alone.
        spec: a spec, ``"none"`` for whole images, or None for the engine's own.
    """

    question: str
    images: tuple[Image, ...] = ()
    spec: Any = None


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        tokens: ids that were written, greedily, up to the end of the sequence.
        logprobs: of each.
        prompt_tokens: length of the prompt in the language model.
        kept: of each image that lost tokens, which are left.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_tokens: int
    kept: list[list[int]]


def sized(image: Image) -> list[Image]:
    """An image in the sizes of `SIZES`."""
    return [image.resize((round(image.width * wide), round(image.height * tall))) for tall, wide in SIZES]


def requests(
    image: Image, questions: Sequence[str], *, reading: bool = True, without: Sequence[str] = ()
) -> list[Request]:
    """Prompts of one image in all sizes and specs, of several images, of none.

    Args:
        image: that the questions are about.
        questions: at least two.
        reading: whether the engine can read the model's vision tower.
        without: compressors that are not asked for.
    """
    read = [spec for spec in READING if reading and spec["compressor"]["name"] not in without]
    images = sized(image)
    first, second = questions[:2]
    asked = [Request(first, (one,)) for one in images]
    asked += [Request(second, (one,)) for one in images[:3]]  # the same images: their keys and values are there
    asked += [Request(first, (images[0],), spec) for spec in (*SPECS, *read, "none")]  # one image, several specs
    asked += [Request(second, (images[3],), spec) for spec in SPECS]
    # Large images have patches that are alike but for rounding, among which `vispruner` has to choose.
    asked += [Request(second, (images[2],), spec) for spec in read]
    asked += [Request(first, (images[0], images[2])), Request(second, (images[4], images[0], images[5]))]
    asked += [Request(first), Request(second)]
    return asked


def reference(
    model: Any, processor: Any, asked: Sequence[Request], default: Any, new_tokens: int, ends: frozenset[int]
) -> list[Answer]:
    """What a pipeline answers to each request, one after the other.

    Args:
        model: of transformers, in evaluation mode.
        processor: its own.
        asked: the requests.
        default: the spec of requests without one.
        new_tokens: at most.
        ends: ids that end an answer.
    """
    pipelines: dict[str, Pipeline] = {}
    answers = []
    for one in asked:
        spec = default if one.spec is None else one.spec
        inputs = processor(
            text=[prompt_for(processor, len(one.images), one.question)],
            images=list(one.images) or None,
            return_tensors="pt",
        )
        if spec == "none" or not one.images:
            answers.append(_generated(model, inputs, new_tokens, ends, int(inputs["input_ids"].shape[1]), []))
            continue
        pipeline = pipelines.setdefault(str(spec), Pipeline.from_spec(spec, model))
        with pipeline:
            answer = _generated(model, inputs, new_tokens, ends, 0, [])
        report = pipeline.report
        compressor = report.samples[0].compressor
        kept = [] if compressor is None else [image.indices for image in compressor.images]
        answers.append(Answer(answer.tokens, answer.logprobs, report.layer_tokens[0][0], kept))
    return answers


def _generated(
    model: Any, inputs: Any, new_tokens: int, ends: frozenset[int], length: int, kept: list[list[int]]
) -> Answer:
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token]) for token, logits in zip(tokens, out.logits, strict=True)
    ]
    return until(Answer(tokens, logprobs, length, kept), ends)


def until(answer: Answer, ends: frozenset[int]) -> Answer:
    """An answer up to the end of the sequence, which is a token like others: no comparison is of nothing."""
    stop = next((at + 1 for at, token in enumerate(answer.tokens) if token in ends), len(answer.tokens))
    return Answer(answer.tokens[:stop], answer.logprobs[:stop], answer.prompt_tokens, answer.kept)
