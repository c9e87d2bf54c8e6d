"""Models of any source, loaded by name: one loader for the command line and for jobs."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import InputError, UnsupportedModelError, first_line
from .find import find_model

__all__ = ["load_model"]


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor.

    Args:
        name: what `find_model` takes.
        dtype: `auto` (as the checkpoint says), `float32`, `bfloat16` or `float16`.
        device: `auto` (an accelerator where there is one), or a torch device such as `cpu` or `cuda:1`.

    Raises:
        InputError: there is no such model, it cannot be loaded, or there is no such device.
        UnsupportedModelError: it is no image-text-to-text model.
    """
    import torch
    import transformers

    place = find_model(name)
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    auto: Any = transformers  # its typing changes from version to version
    if not sys.stderr.isatty():
        auto.utils.logging.disable_progress_bar()
    try:
        model = auto.AutoModelForImageTextToText.from_pretrained(place, dtype=dtype)
        processor = auto.AutoProcessor.from_pretrained(place)
    except ValueError as error:
        if "Unrecognized" in str(error) or "not recognized" in str(error) or "does not recognize" in str(error):
            raise UnsupportedModelError(
                f"model {name!r}: transformers has no image-text-to-text model for it ({first_line(error)}); give a "
                "vision-language model such as llava-hf/llava-1.5-7b-hf."
            ) from error
        raise InputError(f"model {name!r}: cannot be loaded ({first_line(error)}).") from error
    except Exception as error:  # whatever a damaged checkpoint or a missing network raises is the user's to know
        raise InputError(
            f"model {name!r}: cannot be loaded ({type(error).__name__}: {first_line(error)}); check that the folder is "
            "complete, or that the hub can be reached."
        ) from error
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: {first_line(error)}; give cpu, cuda or cuda:N.") from error
