"""The answers on disk: a file a row, a line a question; what is there already is not asked again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from ...core.files import read_plain, replace_file
from ...errors import InputError
from ..jsonlines import Line, append_lines, cut_lines, read_lines

__all__ = ["AnswerFiles", "RowAnswer"]

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class RowAnswer:
    """What one row answered to one question.

    Attributes:
        question: its number in the task.
        text: the answer.
        tokens: visual tokens of the image that was shown, before any reduction.
        average: visual tokens averaged over the decoder layers.
        flops: of the prefill and the vision tower, counted; None where the formulas do not know the model.
        answer_flops: of the whole answer, decoding included; None likewise, and in files of earlier versions.
        text_tokens: tokens of the prompt that are not visual; None in files of earlier versions.
        new_tokens: tokens of the answer, its end token included; likewise.
    """

    question: Count
    text: str
    tokens: Count
    average: Amount
    flops: Amount | None
    answer_flops: Amount | None = None
    text_tokens: Count | None = None
    new_tokens: Count | None = None


_SHAPE = TypeAdapter(RowAnswer)
_REMEDY = "remove that file to have the row asked again, or give another --out."


class AnswerFiles:
    """A folder with the answers, written batch by batch."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Opens a folder, new or begun.

        Args:
            folder: the folder.
            header: what the answers depend on; a begun folder must have the same.

        Raises:
            InputError: the folder holds answers to something else, or cannot be written.
        """
        self._folder = folder / "answers"
        file = folder / "header.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._check(_header(file), header, folder)
                return
            if any(self._folder.glob("*.jsonl")):
                raise InputError(
                    f"out {str(folder)!r}: it holds answers, but no header.json that says to what; give another --out."
                )
            replace_file(file, json.dumps(dict(header), indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise InputError(f"out {str(folder)!r}: cannot be used ({error}); give another --out.") from error

    @staticmethod
    def _check(stored: dict[str, Any], header: Mapping[str, Any], folder: Path) -> None:
        expected = json.loads(json.dumps(dict(header)))
        other = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
        if other:
            raise InputError(
                f"out {str(folder)!r}: it holds answers with other {', '.join(other)}; going on would mix two "
                "measurements. Give another --out, or remove the folder to start again."
            )

    def read(self, row: str, key: str, batches: Sequence[Sequence[int]]) -> tuple[list[RowAnswer], int]:
        """The answers of a row so far, and how many batches they are; an unfinished batch at the end is cut off.

        Args:
            row: name of the row.
            key: what the row's answers depend on.
            batches: numbers of the questions, batch by batch.

        Raises:
            InputError: a line is damaged, or answers another question than the one whose turn it is.
        """
        file = self._file(row, key)
        if not file.exists():
            return [], 0
        lines = list(read_lines(file, _SHAPE, what="answers", form=_REMEDY, torn=True))
        whole, done = 0, 0
        for batch in batches:
            if not _answers(lines[whole : whole + len(batch)], batch):
                break
            whole, done = whole + len(batch), done + 1
        begun = batches[done][: len(lines) - whole] if done < len(batches) else []
        if not _answers(lines[whole:], begun):
            self._refuse(file, lines[whole:], begun)
        cut_lines(file, lines[whole - 1].end if whole else 0)
        return [line.value for line in lines[:whole]], done

    @staticmethod
    def _refuse(file: Path, lines: Sequence[Line[RowAnswer]], wanted: Sequence[int]) -> None:
        turns = [*wanted, *[None] * (len(lines) - len(wanted))]
        line, turn = next((a, b) for a, b in zip(lines, turns, strict=True) if a.value.question != b)
        due = "nothing more is asked" if turn is None else f"it is the turn of question {turn}"
        raise InputError(
            f"answers {str(file)!r}, line {line.number}: found an answer to question {line.value.question}, but {due}; "
            f"{_REMEDY}"
        )

    def add(self, row: str, key: str, answers: Sequence[RowAnswer]) -> None:
        """Appends a batch; when this returns, it survives the end of the process and of the machine.

        Raises:
            InputError: it cannot be written.
        """
        append_lines(self._file(row, key), _SHAPE, answers)

    def _file(self, row: str, key: str) -> Path:
        mark = hashlib.sha256(f"{row}\n{key}".encode()).hexdigest()[:8]
        return self._folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', row)[:80]}-{mark}.jsonl"


def _answers(lines: Sequence[Line[RowAnswer]], batch: Sequence[int]) -> bool:
    """Whether the lines answer just these questions, in this order."""
    return [line.value.question for line in lines] == list(batch)


def _header(file: Path) -> dict[str, Any]:
    remedy = "give another --out."
    try:
        header = json.loads(read_plain(file, f"header {str(file)!r}", remedy))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"header {str(file)!r}: no JSON object; {remedy}")
    return header
