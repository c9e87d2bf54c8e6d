"""Images and prompts from files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter

from ...core.files import read_plain
from ...core.images import MAX_PIXELS, load_image
from ...errors import InputError
from ..jsonlines import read_lines

#: The prompt where none is given.
DESCRIBE = "Describe this picture in one or two sentences."

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class PromptSample:
    """One prompt about one image.

    Attributes:
        image: the image, or a file that is read when its turn comes.
        prompt: what is asked, in the user's own words.
        name: of the image. Samples of one name belong together: intervals draw them together, and a split never
            separates them.
    """

    image: Path | Image.Image = field(repr=False)
    prompt: str
    name: str

    def load(self) -> Image.Image:
        """The image as RGB.

        Raises:
            InputError: the file cannot be read.
        """
        return load_image(self.image) if isinstance(self.image, Path) else self.image.convert("RGB")

    def question(self) -> tuple[list[Image.Image], str]:
        """The images and the text of the prompt; errors as `load`."""
        return [self.load()], self.prompt


def read_samples(
    images: Path, prompts: Path | Sequence[str] | None = None, *, limit: int | None = None
) -> list[PromptSample]:
    """Samples from a folder of images.

    Args:
        images: the folder; its own files with the suffix of an image count, in the order of their names.
        prompts: texts, each for every image; a text file with one prompt a line; a ``.jsonl`` file with
            ``{"image": name in the folder, "prompt": text}`` a line; None: `DESCRIBE`.
        limit: at most this many images, the first ones.

    Raises:
        InputError: there is no such folder or file, nothing is in it, a line is wrong, or an image cannot be read.
    """
    if not images.is_dir():
        raise InputError(f"images {str(images)!r}: there is no such folder; give a folder with images.")
    if isinstance(prompts, Path) and prompts.suffix.lower() == ".jsonl":
        pairs = _pairs(images, prompts)
    else:
        texts = [DESCRIBE] if prompts is None else _lines(prompts) if isinstance(prompts, Path) else list(prompts)
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(
                f"images {str(images)!r}: no image in this folder; give one with files that end in "
                f"{', '.join(sorted(SUFFIXES))} (images in folders below it do not count)."
            )
        pairs = [(file, text) for file in files for text in texts]
    if not pairs or any(not text.strip() for _, text in pairs):
        raise InputError("prompts: there is none, or an empty one; give at least one text.")
    kept = list(dict.fromkeys(file for file, _ in pairs))[:limit]
    for file in kept:
        _check(file)
    chosen = set(kept)
    return [PromptSample(file, text, file.name) for file, text in pairs if file in chosen]


def _lines(file: Path) -> list[str]:
    place = f"prompts {str(file)!r}"
    data = read_plain(file, place, "give a text file with one prompt a line.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: cannot be read ({error}); give a text file in UTF-8.") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{place}: the file is empty; write one prompt a line.")
    return lines


class _Pair(BaseModel):
    """A line of a file of prompts; other keys, such as an answer, are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")

    image: str
    prompt: str


_SHAPE = TypeAdapter(_Pair)
_FORM = 'write {"image": "a.png", "prompt": "What is this?"}.'


def _pairs(images: Path, file: Path) -> list[tuple[Path, str]]:
    pairs = []
    for line in read_lines(file, _SHAPE, what="prompts", form=_FORM):
        image = images / line.value.image
        if not os.path.isfile(image):  # unlike Path's, False for a name that is too long
            raise InputError(
                f"prompts {str(file)!r}, line {line.number}: there is no image {str(image)!r}; names count from "
                "the folder of --images."
            )
        pairs.append((image, line.value.prompt))
    return pairs


def _check(file: Path) -> None:
    """Refuses a file that is no image before anything runs; damage further in is found when its turn comes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said below, with a remedy
            with Image.open(file) as opened:
                width, height = opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        load_image(file)  # says what is wrong
        raise
    if width * height > MAX_PIXELS:
        load_image(file)
