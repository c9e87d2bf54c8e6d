"""The answers on disk: a file a row, a line a question; what is there already is not asked again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trio.errors import InputError

__all__ = ["Answer", "AnswerFiles"]


@dataclass(frozen=True)
class Answer:
    """What one row answered to one question.

    Attributes:
        question: its number in the task.
        text: the answer.
        tokens: visual tokens of the picture that was shown, before any reduction.
        average: visual tokens averaged over the decoder layers.
        flops: of the prefill and the vision tower, counted; None where the formulas do not know the model.
    """

    question: int
    text: str
    tokens: int
    average: float
    flops: float | None


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
                self._check(json.loads(file.read_text(encoding="utf-8")), header, folder)
            else:
                _replace(file, json.dumps(dict(header), indent=1, sort_keys=True) + "\n")
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"out {str(folder)!r}: cannot be used ({error}); give another --out.") from error

    @staticmethod
    def _check(found: dict[str, Any], header: Mapping[str, Any], folder: Path) -> None:
        wanted = json.loads(json.dumps(dict(header)))
        other = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if other:
            raise InputError(
                f"out {str(folder)!r}: it holds answers with other {', '.join(other)}; going on would mix two "
                "measurements. Give another --out, or remove the folder to start again."
            )

    def read(self, row: str, key: str, batches: Sequence[Sequence[int]]) -> tuple[list[Answer], int]:
        """The answers of a row so far, and how many batches they are; half a batch is thrown away.

        Args:
            row: name of the row.
            key: what the row's answers depend on.
            batches: numbers of the questions, batch by batch.
        """
        file = self._file(row, key)
        if not file.exists():
            return [], 0
        answers = []
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the process ended within the line
            answers.append(Answer(**json.loads(line)))
        whole, done = 0, 0
        for batch in batches:
            if [a.question for a in answers[whole : whole + len(batch)]] != list(batch):
                break
            whole, done = whole + len(batch), done + 1
        if whole < len(answers) or not file.read_bytes().endswith(b"\n"):
            _replace(file, "".join(_line(answer) for answer in answers[:whole]))
        return answers[:whole], done

    def add(self, row: str, key: str, answers: Sequence[Answer]) -> None:
        """Appends a batch; when this returns, it survives the end of the process and of the machine."""
        with self._file(row, key).open("a", encoding="utf-8") as file:
            file.write("".join(_line(answer) for answer in answers))
            file.flush()
            os.fsync(file.fileno())

    def _file(self, row: str, key: str) -> Path:
        mark = hashlib.sha256(f"{row}\n{key}".encode()).hexdigest()[:8]
        return self._folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', row)[:80]}-{mark}.jsonl"


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def _replace(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
