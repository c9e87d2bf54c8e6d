"""Files that others wrote: plain ones are read, anything else is refused before it can block or fill the memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, TrioError

__all__ = ["read_plain", "read_plain_lines", "replace_file", "sync_folder"]


def read_plain(
    file: Path, label: str, remedy: str, *, most: int | None = None, error: type[TrioError] = InputError
) -> bytes:
    """The bytes of a plain file; a pipe, a device or a folder is never opened.

    Args:
        file: what to read.
        label: what the message calls it.
        remedy: how the message ends.
        most: bytes that it may have; None: any number.
        error: what is raised.

    Raises:
        TrioError: of the type `error`: it cannot be read, is no plain file, or is larger.
    """
    with _opened(file, label, remedy, error) as opened:
        data = opened.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise error(f"{label}: larger than {most} bytes; {remedy}")
    return data


def read_plain_lines(file: Path, label: str, remedy: str) -> Iterator[bytes]:
    """The lines of a plain file with their line feeds, one after the other: the file may be larger than the memory.

    Args:
        file: what to read.
        label: what the message calls it.
        remedy: how the message ends.

    Raises:
        InputError: as `read_plain`.
    """
    with _opened(file, label, remedy, InputError) as opened:
        yield from opened


@contextmanager
def _opened(file: Path, label: str, remedy: str, error: type[TrioError]) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            what = "a folder" if file.is_dir() else "a pipe, a socket or a device"
            raise error(f"{label}: cannot be read ({what}, not a plain file); {remedy}")
        with file.open("rb") as opened:
            yield opened
    except TrioError:  # some are ValueErrors
        raise
    except (OSError, ValueError) as problem:  # ValueError: a path with a zero byte
        raise error(f"{label}: cannot be read ({getattr(problem, 'strerror', None) or problem}); {remedy}") from problem


def replace_file(file: Path, text: str) -> None:
    """Writes a file whole or not at all, whenever the process or the machine ends.

    Raises:
        OSError: it cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Makes a new name in a folder survive the end of the machine, where the system can."""
    with suppress(OSError):  # Windows opens no folders
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
