"""What the commands share: options, what they write, and models; images and prompts come from `trio.core.images`."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import DEFAULT_SPEC
from ..core.images import inputs_for, load_image
from ..core.printable import HIDDEN, visible
from ..errors import InputError, first_line
from ..zoo.checkpoint import load_model
from ..zoo.find import find_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "IMAGES",
    "OUT",
    "BatchSize",
    "DType",
    "DTypeName",
    "Device",
    "Force",
    "Json",
    "MaxNewTokens",
    "ModelArgument",
    "ModelName",
    "Prompts",
    "RayAddress",
    "RayWorkers",
    "SpecName",
    "SpecNames",
    "WorkerCpus",
    "WorkerGpus",
    "check_outputs",
    "find_model",
    "first_line",
    "inputs_for",
    "load_config",
    "load_image",
    "load_model",
    "print_json",
    "progress_bar",
    "say",
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


# Options that several commands have: each is written once, so that it has one name and one meaning.
ModelName = Annotated[str, typer.Option("--model", "-m", help="Zoo model, folder or hub name.")]
ModelArgument = Annotated[str, typer.Argument(help="Zoo model, folder or hub name.", metavar="MODEL")]
SpecName = Annotated[str, typer.Option("--spec", "-s", help="Shipped spec (`trio list specs`) or a YAML file.")]
SpecNames = Annotated[
    list[str] | None,
    typer.Option("--spec", "-s", help=f"Shipped spec or a YAML file; may be repeated. Default: {DEFAULT_SPEC}."),
]
IMAGES = typer.Option("--images", help="Folder with images.")
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "-p",
        help='Text file, one prompt a line, each for every image; or JSONL, {"image": ..., "prompt": ...}. '
        "Default: those of the command, such as one that asks for a description.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=4096, help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Prompts in a batch.")]
DTypeName = Annotated[DType, typer.Option("--dtype", help="Number format of the weights.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", help="Address of a Ray cluster (auto: the one of this machine); local starts one here."),
]
RayWorkers = Annotated[
    int, typer.Option("--workers", min=1, help="Models that answer at the same time; above 1 with --ray.")
]
WorkerCpus = Annotated[float, typer.Option("--worker-cpus", min=0.0, help="With --ray: logical CPUs of a worker.")]
WorkerGpus = Annotated[
    float | None,
    typer.Option("--worker-gpus", min=0.0, help="With --ray: GPUs of a worker. Default: 1 where there are any."),
]
Device = Annotated[str, typer.Option("--device", help="Where to run: auto, cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
#: Names of the option that says what to write; each command says what that is.
OUT = ("--out", "-o")


def say(text: str, *, err: bool = False) -> None:
    """A line on standard output or error; what would steer the terminal is written out."""
    typer.echo(visible(text, keep=""), err=err)


def print_json(value: Any) -> None:
    """One JSON value, and nothing else, on standard output."""
    import json

    text = json.dumps(value, indent=2, ensure_ascii=False)
    # JSON escapes some control characters; the others mean the same escaped.
    typer.echo(HIDDEN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text))


@contextmanager
def progress_bar(what: str, *, rate: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error where that is a terminal, else nothing; gives what to tell (done, of how many).

    Args:
        what: its title.
        rate: also how many are done in a second.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .terminal import SafeConsole

    err = SafeConsole(stderr=True)
    title = TextColumn("{task.description}", markup=False)
    speed = [TextColumn("{task.fields[rate]}")] if rate else []
    columns = (title, BarColumn(), MofNCompleteColumn(), *speed, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None, rate="")
        first: list[tuple[int, float]] = []

        def tell(done: int, total: int) -> None:
            begun, start = first[0] if first else (done, time.monotonic())
            first[:] = [(begun, start)]
            passed = time.monotonic() - start
            bar.update(task, completed=done, total=total, rate=f"{(done - begun) / passed:.1f}/s" if passed else "")

        yield tell


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


def check_plot(file: Path) -> None:
    """Refuse, before the long work starts, a plot that could not be drawn.

    Raises:
        InputError: matplotlib is missing, or the name has another ending than .png, .pdf or .svg.
    """
    from ..measure.plots import matplotlib

    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--plot {str(file)!r}: the name has to end in .png, .pdf or .svg.")
    matplotlib()


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
