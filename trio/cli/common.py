"""What the commands share: output and models; pictures and prompts come from `trio.core.images`."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.images import inputs_for, load_picture
from ..core.printable import HIDDEN, visible
from ..errors import InputError, UnsupportedModelError, first_line
from ..zoo.find import find_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console

__all__ = [
    "DType",
    "check_outputs",
    "console",
    "duration",
    "find_model",
    "first_line",
    "inputs_for",
    "layer_ranges",
    "load_config",
    "load_model",
    "load_picture",
    "print_json",
    "print_notes",
    "progress_bar",
    "quantity",
    "say",
    "times",
    "unused",
    "writable",
    "write_text",
]


class DType(StrEnum):
    """Number formats that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def console() -> Console:
    """The console for results: standard output, 100 columns where it is no terminal."""
    from .terminal import SafeConsole

    out = SafeConsole(highlight=False, soft_wrap=False)
    return out if out.is_terminal else SafeConsole(highlight=False, width=100)


def say(text: str, *, err: bool = False) -> None:
    """A line on standard output or error; what would steer the terminal is written out."""
    import typer

    typer.echo(visible(text, keep=""), err=err)


def print_json(value: Any) -> None:
    """One JSON value, and nothing else, on standard output."""
    import json

    import typer

    text = json.dumps(value, indent=2, ensure_ascii=False)
    # JSON escapes some control characters; the others mean the same escaped.
    typer.echo(HIDDEN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error where that is a terminal, else nothing; gives what to tell (done, of how many)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .terminal import SafeConsole

    err = SafeConsole(stderr=True)
    title = TextColumn("{task.description}", markup=False)
    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_notes(out: Console, notes: Sequence[str], most: int = 6) -> None:
    """Notes, a line each; of many only the first, and how many more there are."""
    from rich.text import Text

    for note in notes[:most]:
        out.print(Text(f"note: {note}"))
    if len(notes) > most:
        out.print(Text(f"and {len(notes) - most} more notes; --json FILE writes them all"))


def check_outputs(files: Mapping[str, Path | None], *, force: bool) -> None:
    """Refuse, before the long work starts, files that cannot be written or that are there already.

    Args:
        files: by option; None where the option is not given.
        force: existing files may be replaced.

    Raises:
        InputError: as `writable`, or two options name one file.
    """
    given = {option: writable(file, option, force=force) for option, file in files.items() if file is not None}
    taken: dict[Path, str] = {}
    for option, file in given.items():
        other = taken.setdefault(file.resolve(), option)
        if other != option:
            raise InputError(f"{option} {str(file)!r}: {other} names the same file; give each a name of its own.")


def writable(file: Path, option: str, *, force: bool = False) -> Path:
    """The path, refused early where it cannot be written, or where a file stands there and `force` is not given.

    Raises:
        InputError: there is no such folder, it cannot be written to, the path is a folder, or the file exists.
    """
    place, folder = f"{option} {str(file)!r}", Path(os.path.realpath(file)).parent
    if os.path.isdir(file):
        raise InputError(f"{place}: this is a folder; give the name of a file.")
    if not os.path.isdir(folder):
        raise InputError(f"{place}: there is no folder {str(folder)!r}; make it first.")
    # A device or a pipe, such as /dev/stdout, loses nothing.
    if not force and (os.path.isfile(file) or os.path.islink(file)):
        raise InputError(f"{place}: this file exists and would be overwritten; give another name, or add --force.")
    if not os.access(file if os.path.exists(file) else folder, os.W_OK):
        raise InputError(f"{place}: it cannot be written, its rights forbid it; give another place.")
    return file


def unused(file: Path) -> Path:
    """The path, or where a file stands there the first free one with a number: `name-2.png`, `name-3.png` ..."""
    number, free = 1, file
    while os.path.lexists(free):
        number, free = number + 1, file.with_stem(f"{file.stem}-{number + 1}")
    return free


def write_text(file: Path, text: str, option: str) -> None:
    """Writes what was worked out.

    Raises:
        InputError: it cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {str(file)!r}: cannot be written ({error.strerror or error}).") from error


def times(value: float | None) -> str:
    """A ratio for people: `5.13x`."""
    return "?" if value is None else f"{value:.2f}x"


def quantity(value: float, unit: str, *, base: int = 1000) -> str:
    """A large number with a prefix: `2.98 TFLOP`, `1.5 MiB` (with base 1024)."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    index = 0
    while value >= base and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    prefix = prefixes[index] + ("i" if base == 1024 and index else "")
    return f"{value:.0f} {unit}" if index == 0 else f"{value:.2f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Milliseconds below a second, seconds above."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def layer_ranges(*columns: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Runs of layers over which every column is constant, counted from 1: [("1-16", (576, 96)), ...]."""
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for layer, values in enumerate(zip(*columns, strict=True), start=1):
        if runs and runs[-1][2] == values:
            runs[-1] = (runs[-1][0], layer, values)
        else:
            runs.append((layer, layer, values))
    return [(str(first) if first == last else f"{first}-{last}", values) for first, last, values in runs]


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


def load_config(name: str) -> Any:
    """A model's config without its weights.

    Raises:
        InputError: there is no such model, or its config cannot be read.
    """
    import transformers

    place = find_model(name)
    try:
        return transformers.AutoConfig.from_pretrained(place)
    except Exception as error:  # as in load_model
        raise InputError(f"model {name!r}: its config cannot be read ({first_line(error)}).") from error
