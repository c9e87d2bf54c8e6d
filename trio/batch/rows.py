"""The rows of a job: from a table in Parquet or JSON lines, or from a folder with images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .. import DISTRIBUTION
from ..core.images import decode_image, load_image
from ..errors import InputError
from ..measure.fidelity.samples import SUFFIXES
from ..measure.jsonlines import read_lines

__all__ = ["BatchRow", "FolderRows", "JsonRows", "ParquetRows", "RowSource", "open_rows"]

#: Columns that a job reads; a table may have others.
COLUMNS = ("id", "image", "question", "answer")
#: Rows of a Parquet file that are in memory at a time.
READ_ROWS = 128
Text = Annotated[str, Field(pattern=r"\S")]
_FORM = (
    'a line is {"image": PATH}, and may have "id": TEXT or NUMBER, "question": TEXT, and "answer": TEXT or [TEXT, ...].'
)


@dataclass(frozen=True)
class BatchRow:
    """One question about one image.

    Attributes:
        id: names the row in the output; no two rows of a job have the same.
        image: its file, or the bytes of a file.
        question: in words, without a chat template.
        answers: those that count as right; empty where nobody knows.
    """

    id: str
    image: Path | bytes = field(repr=False)
    question: str
    answers: tuple[str, ...] = ()

    def load(self) -> Image.Image:
        """The image as RGB.

        Raises:
            InputError: it is missing, is no image, is damaged or too large.
        """
        if isinstance(self.image, Path):
            return load_image(self.image)
        return decode_image(self.image, f"image of row {self.id!r}")

    @classmethod
    def of_record(cls, record: Mapping[str, Any], folder: Path, question: str | None, place: str) -> BatchRow:
        """A row from the values of its columns.

        Args:
            record: ``id``; ``image``: a path, bytes, or ``{"bytes": ..., "path": ...}`` as in Hugging Face
                data sets; ``question`` and ``answer`` where there are such columns.
            folder: where paths start.
            question: for rows without one of their own.
            place: what messages call the row.

        Raises:
            InputError: a value is missing or of a wrong type.
        """
        image = record.get("image")
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image.strip():
            image = folder / image
        if not isinstance(image, bytes | Path):
            found = "nothing" if not image else type(image).__name__
            raise InputError(f"{place}: `image` is {found}; give a path, or the bytes of an image file.")
        own = record.get("question")
        asked = question if own is None else own
        if not isinstance(asked, str) or not asked.strip():
            raise InputError(f"{place}: it has no `question`; give each row one, or one for all (--question).")
        answer = record.get("answer")
        given = [] if answer is None else [answer] if isinstance(answer, str) else list(answer)
        return cls(str(record["id"]), image, asked, tuple(map(str, given)))


class RowSource(ABC):
    """A table that can be read several times, from its first row to its last."""

    def __init__(self, path: Path, question: str | None) -> None:
        """Names a table.

        Args:
            path: the file or folder.
            question: for rows without one of their own.
        """
        self.path, self.question = path, question

    @abstractmethod
    def rows(self) -> Iterator[BatchRow]:
        """The rows, in their order.

        Raises:
            InputError: the table cannot be read, or a row lacks something.
        """

    def ids(self) -> Iterator[str]:
        """The ids alone, in the order of the rows; errors as `rows`."""
        return (row.id for row in self.rows())


class FolderRows(RowSource):
    """The images of a folder, in the order of their names, which are the ids; folders below it do not count."""

    def rows(self) -> Iterator[BatchRow]:
        """As of the base class."""
        place = f"input {str(self.path)!r}"
        if self.question is None:
            raise InputError(f"{place}: a folder has images and no questions; give one for all of them (--question).")
        files = sorted(file for file in self.path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"{place}: there is no image in it; give a folder with PNG, JPEG or WebP files.")
        for file in files:
            yield BatchRow(file.name, file.resolve(), self.question)


class _JsonRow(BaseModel):
    """A line of a table; other keys are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")

    image: Text
    id: str | int | None = None
    question: Text | None = None
    answer: str | list[str] | None = None


_SHAPE = TypeAdapter(_JsonRow)


class JsonRows(RowSource):
    """JSON lines; a row without ``id`` has the number of its line, from 1. Paths start at the file's folder."""

    def rows(self) -> Iterator[BatchRow]:
        """As of the base class."""
        folder = self.path.parent.resolve()
        for line in read_lines(self.path, _SHAPE, what="input", form=_FORM):
            record = line.value.model_dump()
            record["id"] = line.number if record["id"] is None else record["id"]
            yield BatchRow.of_record(record, folder, self.question, f"input {str(self.path)!r}, line {line.number}")


class ParquetRows(RowSource):
    """A Parquet file with the columns ``id`` and ``image``, and maybe ``question`` and ``answer``."""

    def columns(self) -> list[str]:
        """The columns of the file that a job reads.

        Raises:
            InputError: the file cannot be read, or lacks one that is needed.
        """
        return self._open()[1]

    def rows(self) -> Iterator[BatchRow]:
        """As of the base class."""
        file, columns = self._open()
        folder, number = self.path.parent.resolve(), 0
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield BatchRow.of_record(
                    record, folder, self.question, f"input {str(self.path)!r}, row {number} (id {record['id']!r})"
                )

    def ids(self) -> Iterator[str]:
        """As of the base class; only that column is read."""
        for batch in self._open()[0].iter_batches(columns=["id"]):
            yield from map(str, batch.column(0).to_pylist())

    def _open(self) -> tuple[Any, list[str]]:
        place = f"input {str(self.path)!r}"
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError(
                f"{place}: pyarrow is not installed, which reads Parquet; install the extra that has it: pip install "
                f"'{DISTRIBUTION}[batch]', or give JSON lines."
            ) from error
        try:
            file = ParquetFile(self.path)
        except (OSError, ArrowException) as error:
            raise InputError(f"{place}: cannot be read as Parquet ({error}); is the file damaged?") from error
        names = list(file.schema_arrow.names)
        missing = [name for name in ("id", "image") if name not in names]
        if missing:
            raise InputError(f"{place}: no column {' and '.join(missing)}; it has {', '.join(names)}. Rename one.")
        if "question" not in names and self.question is None:
            raise InputError(f"{place}: it has no column `question`; add one, or give one for all (--question).")
        return file, [name for name in COLUMNS if name in names]


def open_rows(path: Path, question: str | None = None) -> RowSource:
    """The table at a path: a folder with images, ``.parquet``, or ``.jsonl``.

    Args:
        path: the file or folder.
        question: for rows without one of their own.

    Raises:
        InputError: there is no such file or folder, or it is of another kind.
    """
    if path.is_dir():
        return FolderRows(path, question)
    if not path.exists():
        raise InputError(f"input {str(path)!r}: there is no such file or folder; check the path.")
    kinds: dict[str, type[RowSource]] = {".parquet": ParquetRows, ".jsonl": JsonRows}
    if path.suffix.lower() not in kinds:
        raise InputError(
            f"input {str(path)!r}: its name ends with none of .parquet, .jsonl; give one of them or a folder."
        )
    return kinds[path.suffix.lower()](path, question)
