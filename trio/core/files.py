"""Files that others wrote: plain ones are read, anything else is refused before it can block or fill the memory."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import InputError, TrioError

__all__ = ["read_plain", "replace_file", "sync_folder"]


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
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            what = "a folder" if file.is_dir() else "a pipe, a socket or a device"
            raise error(f"{label}: cannot be read ({what}, not a plain file); {remedy}")
        with file.open("rb") as opened:
            data = opened.read(-1 if most is None else most + 1)
    except (OSError, ValueError) as problem:  # ValueError: a path with a zero byte
        raise error(f"{label}: cannot be read ({getattr(problem, 'strerror', None) or problem}); {remedy}") from problem
    if most is not None and len(data) > most:
        raise error(f"{label}: larger than {most} bytes; {remedy}")
    return data


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
