"""The arguments of ``--model_args``, and the model that they describe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ...errors import InputError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What ``--model_args`` (and ``--batch_size``, ``--device``) say.

    Attributes:
        pretrained: a model of the zoo, a folder or a hub name.
        spec: a shipped spec's name or a path; None (written ``none``): the full model.
        batch_size: requests in one call of ``generate``.
        dtype: number format of the weights; ``auto``: the checkpoint's.
        device: ``auto`` (an accelerator where there is one; with several processes one each) or a torch device.
        device_map: in place of ``device``: spread the weights, as ``from_pretrained`` does.
        attn_implementation: as ``from_pretrained`` takes it; None: its default.
        revision: of a hub model.
        min_pixels: smallest image of a model with images of many sizes (Qwen's), in pixels.
        max_pixels: largest image of such a model, in pixels.
        pad_to_square: pad images to a square with the processor's mean colour, as LLaVA-1.5's own code does (its
            processor in transformers crops instead).
        system_prompt: put in front of every conversation that has none; a text, or a file that holds it.
        max_new_tokens: longest answer where the task names none.
    """

    pretrained: str
    spec: str | None
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    pad_to_square: bool = False
    system_prompt: str | None = None
    max_new_tokens: int = 1024

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Checks what lmms-eval passes on.

        Args:
            arguments: by name; lmms-eval has turned what looks like a number or a truth value into one.

        Raises:
            InputError: an unknown argument, a missing one, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        for name in arguments:
            if name not in known:
                raise InputError(
                    f"model_args: unknown argument {name!r}. {did_you_mean(name, known)}Known: {', '.join(known)}."
                )
        if not arguments.get("pretrained"):
            raise InputError(
                "model_args: `pretrained` is missing; name a zoo model, a folder or a hub model: pretrained=tiny-llava."
            )
        if arguments.get("spec") in (None, ""):
            raise InputError(
                "model_args: `spec` is missing; name a shipped spec or a file (spec=trio-soft-11, see `trio list "
                "specs`), or spec=none for the full model."
            )
        checked = {name: _checked(name, value) for name, value in arguments.items()}
        if checked["spec"] == "none":
            checked["spec"] = None
        settings = cls(**checked)
        if settings.device_map is not None and settings.device != "auto":
            raise InputError("model_args: `device` and `device_map` contradict each other; leave one of them out.")
        return settings


def _checked(name: str, value: Any) -> Any:
    """One argument, of the type that its field has."""
    if name in ("batch_size", "min_pixels", "max_pixels", "max_new_tokens"):
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
            raise InputError(f"model_args: {name} is {value!r}; give a whole number of at least 1.")
        return int(value)
    if name == "pad_to_square":
        if not isinstance(value, bool):
            raise InputError(f"model_args: pad_to_square is {value!r}; give True or False.")
        return value
    if name == "dtype" and value not in DTYPES:
        raise InputError(f"model_args: dtype is {value!r}; give one of {', '.join(DTYPES)}.")
    return None if value is None else str(value)


def place(settings: Settings) -> str | None:
    """The device that the model goes to; None where a device map says it."""
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.device_map is not None:
        if processes > 1:
            raise InputError(
                f"model_args: device_map spreads one model, but {processes} processes run; leave device_map out, or "
                "start one process."
            )
        return None
    if settings.device != "auto":
        return settings.device
    if not torch.accelerator.is_available():
        return "cpu"
    kind = str(torch.accelerator.current_accelerator())
    return f"{kind}:{os.environ.get('LOCAL_RANK', '0')}" if processes > 1 else kind


def load(settings: Settings) -> tuple[Any, Any]:
    """The model in evaluation mode, and its processor, which pads on the left.

    Raises:
        InputError: there is no such model or device, it cannot be loaded, or its processor has no pixel limits to set.
    """
    import transformers

    from ...errors import first_line
    from ...zoo.find import find_model

    source = find_model(settings.pretrained)
    device = place(settings)
    auto: Any = transformers  # its typing changes from version to version
    options = {"device_map": settings.device_map, "attn_implementation": settings.attn_implementation}
    pixels = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    limits = {name: value for name, value in pixels.items() if value is not None}
    try:
        model = auto.AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=settings.dtype,
            revision=settings.revision or "main",
            **{name: value for name, value in options.items() if value is not None},
        )
        processor = auto.AutoProcessor.from_pretrained(source, revision=settings.revision or "main", **limits)
        if device is not None:
            model = model.to(device)
    except Exception as error:  # whatever a damaged checkpoint, a wrong backend or a missing network raises
        raise InputError(
            f"model {settings.pretrained!r}: cannot be loaded on {device or settings.device_map} with dtype "
            f"{settings.dtype} and attention {settings.attn_implementation or 'by default'} ({type(error).__name__}: "
            f"{first_line(error)}); change what it names, or check that the folder is complete or the hub reachable."
        ) from error
    check_processor(settings, processor, limits)
    return model.eval(), processor


def check_processor(settings: Settings, processor: Any, limits: Mapping[str, int]) -> None:
    """What is asked of the processor must be something that it does."""
    kind = type(processor).__name__
    images = getattr(processor, "image_processor", None)
    known = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    for name in limits:
        if name not in known:
            raise InputError(
                f"model_args: {name} means nothing to the {type(images).__name__} of {settings.pretrained!r}; only "
                "models with images of many sizes (Qwen's) have pixel limits. Leave it out."
            )
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            f"model {settings.pretrained!r}: its {kind} has no chat template, so a task's messages cannot be written "
            "as a prompt; take a checkpoint that was tuned for chat."
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
