"""The answers of a job on disk: files of many rows, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from ..core.files import read_plain, replace_file
from ..errors import InputError
from ..measure.jsonlines import read_lines
from .answerer import RowOutput

__all__ = ["Shards"]

_SHAPE = TypeAdapter(RowOutput)
_SETTINGS = TypeAdapter(dict[str, Any])
_REMEDY = "remove that file to have its rows asked again, or give another --out."


class Shards:
    """A folder with `job.json` and `part-000000.jsonl`, `part-000001.jsonl` ..., held by one process at a time."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens a folder, new or begun, and holds it until `close`.

        Args:
            folder: the folder.
            settings: what the answers depend on; a begun folder must have the same.

        Raises:
            InputError: the folder holds answers of another job, another process writes there, or it cannot be used.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = _lock(folder)
        except OSError as error:
            raise InputError(f"out {str(folder)!r}: cannot be used ({error}); give another --out.") from error
        try:
            self._begin(settings)
        except BaseException:
            self.close()
            raise
        self._next = 1 + max((int(file.stem[5:]) for file in self.files()), default=-1)

    def _begin(self, settings: Mapping[str, Any]) -> None:
        file, expected = self.folder / "job.json", json.loads(json.dumps(dict(settings)))
        place = f"out {str(self.folder)!r}"
        if not file.exists():
            if self.files():
                raise InputError(f"{place}: it holds parts, but no job.json that says of what; give another --out.")
            replace_file(file, json.dumps(expected, indent=1, sort_keys=True) + "\n")
            return
        try:
            stored = _SETTINGS.validate_json(read_plain(file, f"job {str(file)!r}", _REMEDY))
        except ValidationError:
            raise InputError(f"job {str(file)!r}: no JSON object; give another --out.") from None
        other = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
        if other:
            raise InputError(
                f"{place}: it holds answers with other {', '.join(other)}; going on would mix two jobs. Give another "
                "--out, or remove the folder to start again."
            )

    def files(self) -> list[Path]:
        """The parts, in the order in which they were written."""
        return sorted(file for file in self.folder.glob("part-*.jsonl") if file.stem[5:].isdecimal())

    def results(self) -> Iterator[RowOutput]:
        """All that is written, part by part.

        Raises:
            InputError: a part is damaged.
        """
        for file in self.files():
            for line in read_lines(file, _SHAPE, what="part", form=_REMEDY):
                yield line.value

    def write(self, results: Sequence[RowOutput]) -> None:
        """Writes the next part; when this returns, it survives the end of the process and of the machine.

        Raises:
            InputError: it cannot be written; nothing of it is then there.
        """
        file = self.folder / f"part-{self._next:06d}.jsonl"
        try:
            replace_file(file, "".join(_SHAPE.dump_json(one).decode() + "\n" for one in results))
        except OSError as error:
            raise InputError(
                f"{str(file)!r}: cannot be written ({error.strerror or error}); make room for it."
            ) from error
        self._next += 1

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def _lock(folder: Path) -> int | None:
    """Holds the folder for this process; the system lets it go when the process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # Windows: two jobs in one folder are then found by their rows, at the end
        return None
    opened = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        raise InputError(
            f"out {str(folder)!r}: another process writes there; wait for it, or give another --out."
        ) from error
    return opened
