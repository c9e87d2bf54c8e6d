"""What lmms-eval asks, made ready for ``generate``: conversations, options, batches, and where an answer ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...core.images import load_image
from ...errors import InputError, did_you_mean


@dataclass(frozen=True)
class Conversation:
    """A prompt: messages as a processor's chat template takes them, and how many images they bring."""

    messages: list[dict[str, Any]]
    images: int


def conversation(
    messages: Sequence[Mapping[str, Any]],
    *,
    system_prompt: str | None = None,
    square: tuple[int, int, int] | None = None,
    placeholder: str | None = None,
) -> Conversation:
    """A task's messages as a chat template takes them.

    Args:
        messages: of lmms-eval: ``{"role": ..., "content": [{"type": "image", "url": image or path}, {"type": "text",
            "text": ...}]}``.
        system_prompt: put in front where the messages have none.
        square: colour (0 to 255) that images are padded to a square with; None: they stay as they are.
        placeholder: the processor's own sign for an image. A text that holds it once for each image of its message
            gets the images there; else they stay where the message has them.

    Raises:
        InputError: a part that is neither text nor an image, or a text with placeholders for other images.
    """
    made: list[dict[str, Any]] = []
    count = 0
    if system_prompt and not (messages and messages[0]["role"] == "system"):
        made.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        ready = [_part(part, square) for part in parts]
        count += sum(part["type"] == "image" for part in ready)
        made.append({"role": message["role"], "content": _placed(ready, placeholder)})
    return Conversation(made, count)


def _part(part: Mapping[str, Any], square: tuple[int, int, int] | None) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        image = part.get("url", part.get("image"))
        if isinstance(image, str | Path):
            image = load_image(Path(image))
        if not isinstance(image, Image.Image):
            raise InputError(f"task: an image comes as {type(image).__name__}; give a PIL image or a file's path.")
        image = image.convert("RGB")
        return {"type": "image", "image": image if square is None else squared(image, square)}
    raise InputError(
        f"task: a message brings {kind!r}; `--model trio` answers questions about images only. Choose image tasks."
    )


def _placed(parts: list[dict[str, Any]], placeholder: str | None) -> list[dict[str, Any]]:
    """The parts with images at their placeholders, if the text has any."""
    placeholders = 0 if placeholder is None else sum(p["text"].count(placeholder) for p in parts if p["type"] == "text")
    if not placeholders or placeholder is None:
        return parts
    images = [part for part in parts if part["type"] == "image"]
    if placeholders != len(images):
        raise InputError(
            f"task: a text holds {placeholder!r} {placeholders} times, but its message has {len(images)} images; the "
            "model would look for images that are not there. Take the sign out of the task's text."
        )
    waiting = iter(images)
    made: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            continue
        for number, text in enumerate(part["text"].split(placeholder)):
            if number:
                made.append(next(waiting))
            if text:
                made.append({"type": "text", "text": text})
    return made


def squared(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    width, height = image.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def generation(given: Mapping[str, Any], *, max_new_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A task's ``generation_kwargs`` as options of ``generate``, and the strings that end an answer.

    Greedy unless the task sets ``do_sample`` or a temperature above 0; what only sampling reads is then left out.

    Args:
        given: of the task.
        max_new_tokens: where the task names none.

    Raises:
        InputError: an option that ``generate`` does not know, or that asks for several answers.
    """
    import transformers

    config: Any = transformers.GenerationConfig  # its typing changes from version to version
    options = dict(given)
    until = options.pop("until", None)
    ends = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(ends, list | tuple) or not all(isinstance(end, str) for end in ends):
        raise InputError(f"task: generation_kwargs.until is {until!r}; give a string or a list of strings.")
    length = options.pop("max_gen_toks", max_new_tokens)
    options.setdefault("max_new_tokens", length)
    known = [name for name in vars(config()) if not name.startswith("_")]
    for name in options:
        if name not in known:
            raise InputError(
                f"task: generation_kwargs.{name}: `generate` has no such option. {did_you_mean(name, known)}Set it off "
                "in the task, or with --gen_kwargs."
            )
    if options.get("num_return_sequences") not in (None, 1):
        raise InputError("task: generation_kwargs.num_return_sequences: a request has one answer; leave it out.")
    sampled = bool(options.get("do_sample", (options.get("temperature") or 0) > 0))
    options["do_sample"] = sampled
    if not sampled:  # None also keeps the checkpoint's own defaults, which would be warned of, out
        options |= {"temperature": None, "top_p": None, "top_k": None}
    options["num_beams"] = options.get("num_beams") or 1
    return options, tuple(end for end in ends if end)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    places = [text.find(end) for end in until]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def batches(requests: Sequence[tuple[str, Mapping[str, Any]]], size: int) -> list[list[int]]:
    """Indices of requests that may share one call: equal generation options; longest first, so that padding is little.

    Args:
        requests: text and generation options of each.
        size: requests in a batch at most.
    """
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
        groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(index)
    made = []
    for group in groups.values():
        group.sort(key=lambda index: -len(requests[index][0]))
        made += [group[first : first + size] for first in range(0, len(group), size)]
    return made
