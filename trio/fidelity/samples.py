"""Pictures and prompts from files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from trio.errors import InputError
from trio.inputs import MAX_PIXELS, load_picture

#: The prompt where none is given.
DESCRIBE = "Describe this picture in one or two sentences."

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Sample:
    """One prompt about one picture.

    Attributes:
        picture: the picture, or a file that is read when its turn comes.
        prompt: what is asked, in the user's own words.
        name: of the picture. Samples of one name belong together: intervals draw them together, and a split never
            separates them.
    """

    picture: Path | Image.Image = field(repr=False)
    prompt: str
    name: str

    def load(self) -> Image.Image:
        """The picture as RGB.

        Raises:
            InputError: the file cannot be read.
        """
        return load_picture(self.picture) if isinstance(self.picture, Path) else self.picture.convert("RGB")


def read_samples(
    images: Path, prompts: Path | Sequence[str] | None = None, *, limit: int | None = None
) -> list[Sample]:
    """Samples from a folder of pictures.

    Args:
        images: the folder; its own files with the suffix of a picture count, in the order of their names.
        prompts: texts, each for every picture; a text file with one prompt a line; a ``.jsonl`` file with
            ``{"image": name in the folder, "prompt": text}`` a line; None: `DESCRIBE`.
        limit: at most this many pictures, the first ones.

    Raises:
        InputError: there is no such folder or file, nothing is in it, a line is wrong, or a picture cannot be read.
    """
    if not images.is_dir():
        raise InputError(f"images {str(images)!r}: there is no such folder; give a folder with pictures.")
    if isinstance(prompts, Path) and prompts.suffix.lower() == ".jsonl":
        pairs = _pairs(images, prompts)
    else:
        texts = [DESCRIBE] if prompts is None else _lines(prompts) if isinstance(prompts, Path) else list(prompts)
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(
                f"images {str(images)!r}: no picture in this folder; give one with files that end in "
                f"{', '.join(sorted(SUFFIXES))} (pictures in folders below it do not count)."
            )
        pairs = [(file, text) for file in files for text in texts]
    if not pairs or any(not text.strip() for _, text in pairs):
        raise InputError("prompts: there is none, or an empty one; give at least one text.")
    kept = list(dict.fromkeys(file for file, _ in pairs))[:limit]
    for file in kept:
        _check(file)
    chosen = set(kept)
    return [Sample(file, text, file.name) for file, text in pairs if file in chosen]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"prompts {str(file)!r}: there is no such file; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {str(file)!r}: cannot be read ({error}); give a text file in UTF-8.") from error


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"prompts {str(file)!r}: the file is empty; write one prompt a line.")
    return lines


def _pairs(images: Path, file: Path) -> list[tuple[Path, str]]:
    pairs = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"prompts {str(file)!r}, line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: no JSON ({error}); write one object a line.") from error
        if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("image", "prompt")):
            raise InputError(f'{place}: found {line[:60]!r}; write {{"image": "a.png", "prompt": "What is this?"}}.')
        picture = images / data["image"]
        if not picture.is_file():
            raise InputError(f"{place}: there is no picture {str(picture)!r}; names count from the folder of --images.")
        pairs.append((picture, data["prompt"]))
    return pairs


def _check(file: Path) -> None:
    """Refuses a file that is no picture before anything runs; damage further in is found when its turn comes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said below, with a remedy
            with Image.open(file) as opened:
                width, height = opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        load_picture(file)  # says what is wrong
        raise
    if width * height > MAX_PIXELS:
        load_picture(file)
