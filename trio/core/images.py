"""Images from files, and prompts in a model's own chat format. Nothing heavy is imported until something is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BytesIO

    from PIL.Image import Image

__all__ = [
    "MAX_PIXELS",
    "WEB_FORMATS",
    "batch_for",
    "decode_image",
    "inputs_for",
    "load_image",
    "prompt_for",
]

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte as RGB
#: Formats that strangers may send: Pillow decodes them itself.
WEB_FORMATS = ("PNG", "JPEG", "WEBP")


def load_image(path: Path) -> Image:
    """An image as RGB, upright.

    Raises:
        InputError: it is missing, is not an image, is damaged or is larger than 89 million pixels.
    """
    return _load(path, f"image {str(path)!r}")


def decode_image(
    data: bytes, place: str, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image:
    """An image as RGB, upright, from the bytes of its file.

    Args:
        data: of a PNG, JPEG or WebP file.
        place: what the message calls it.
        max_pixels: width times height at most, known before any pixel is decoded; not above `MAX_PIXELS`.
        formats: those that Pillow may try, such as `WEB_FORMATS`; None: all, some of which start other programs.

    Raises:
        InputError: as `load_image`.
    """
    from io import BytesIO

    return _load(BytesIO(data), place, max_pixels, formats)


def _load(
    source: Path | BytesIO, place: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image:
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise Image.DecompressionBombWarning
                return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{place}: not an image that can be read; give a PNG, JPEG or WebP file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{max_pixels // 10**6} million" if max_pixels >= 10**6 else f"{max_pixels:,}"
        raise InputError(f"{place}: more than {limit} pixels; scale it down first.") from None
    except FileNotFoundError:
        raise InputError(f"{place}: there is no such file; check the path.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{place}: cannot be read ({error}); is the file damaged, or a folder?") from error


def prompt_for(processor: Any, images: int, question: str) -> str:
    """One user's turn as text: placeholders for the images, then the question, in the model's own chat format.

    Raises:
        InputError: the processor has neither a chat template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if getattr(processor, "image_token", None):
        return f"{processor.image_token} " * images + question
    raise InputError(
        f"model: its {type(processor).__name__} has neither a chat template nor an image token, so a prompt cannot be "
        "written for it; use the Python API with your own inputs."
    )


def inputs_for(processor: Any, images: Sequence[Image], question: str) -> Any:
    """What the model's forward takes for one prompt; errors as `prompt_for`."""
    return batch_for(processor, [(images, question)])


def batch_for(processor: Any, prompts: Sequence[tuple[Sequence[Image], str]]) -> Any:
    """What the model's forward takes for a batch of prompts, padded on the left, as `generate` needs it.

    Args:
        processor: of the model.
        prompts: images and question of each.

    Returns:
        The processor's `BatchFeature` with tensors on the CPU.

    Raises:
        InputError: as `prompt_for`; or several prompts for a tokenizer that cannot pad.
    """
    options: dict[str, Any] = {}
    if len(prompts) > 1:
        if getattr(getattr(processor, "tokenizer", processor), "pad_token", None) is None:
            raise InputError(
                "batch: the model's tokenizer has no padding token, so prompts cannot stand in one batch; take one at "
                "a time (batch size 1), or set `processor.tokenizer.pad_token`."
            )
        options = {"padding": True, "padding_side": "left"}
    texts = [prompt_for(processor, len(images), question) for images, question in prompts]
    flat = [image for images, _ in prompts for image in images]
    return processor(text=texts, images=flat or None, return_tensors="pt", **options)
