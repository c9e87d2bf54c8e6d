"""Files of JSON lines: what is text stays text, what is damaged is named, and what was written is never lost."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import trio
from trio.measure import jsonlines
from trio.measure.evaluation.answers import AnswerFiles, RowAnswer
from trio.measure.evaluation.task import jsonl
from trio.measure.fidelity import read_samples

#: Every character at which `str.splitlines` ends a line.
BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
TEXTS = [f"one{c}two" for c in BREAKS] + ["é", '"quoted"', "", "\x00", "😀"]
BATCHES = [[3, 0, 7], [1, 2, 4], [5, 6, 8], [9, 10, 11], [12, 13, 14]]
ANSWERS = [[RowAnswer(i, TEXTS[i], 144, 16.0, None if i % 2 else 1e9) for i in batch] for batch in BATCHES]


def finish(folder: Path) -> list[RowAnswer]:
    """Goes on where a run was stopped, as `trio eval` does."""
    files = AnswerFiles(folder, {"a": 1})
    found, done = files.read("row", "key", BATCHES)
    for batch in ANSWERS[done:]:
        files.add("row", "key", batch)
        found = [*found, *batch]
    return found


def answers_file(folder: Path) -> Path:
    (file,) = (folder / "answers").glob("*.jsonl")
    return file


def test_answers_with_odd_line_breaks_survive(tmp_path: Path) -> None:
    wanted = finish(tmp_path)
    assert AnswerFiles(tmp_path, {"a": 1}).read("row", "key", BATCHES) == (wanted, len(BATCHES))
    assert answers_file(tmp_path).read_bytes().count(b"\n") == len(TEXTS)


def test_a_kill_at_any_byte_loses_at_most_the_unfinished_batch(tmp_path: Path) -> None:
    wanted = finish(tmp_path)
    file = answers_file(tmp_path)
    whole = file.read_bytes()
    lines = whole.split(b"\n")[:-1]
    ends = [sum(len(line) + 1 for line in lines[: 3 * n]) for n in range(len(BATCHES) + 1)]
    places = random.Random(0).sample(range(len(whole)), 50)
    for place in {*places, *ends, *(end - 1 for end in ends[1:])}:
        file.write_bytes(whole[:place])
        finished = sum(end <= place for end in ends[1:])
        found, done = AnswerFiles(tmp_path, {"a": 1}).read("row", "key", BATCHES)
        assert (found, done) == (wanted[: 3 * finished], finished)
        assert file.read_bytes() == whole[: ends[finished]]
        assert finish(tmp_path) == wanted
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"average": "nan"}, "'average': found 'nan'"),
        ({"average": float("nan")}, "'average': found nan"),
        ({"tokens": -1}, "'tokens': found -1"),
        ({"question": "1"}, "'question': found '1'"),
        ({"text": None}, "'text': found None"),
        ({"more": 1}, "unknown key 'more'"),
        ({"question": 2}, "found an answer to question 2, but it is the turn of question 1"),
        ("{", "no JSON"),
        ("[1]", "found list, not an object"),
        ("[" * 100_000, "no JSON"),
        ('{"question": ' + "1" * 5000 + "}", "no JSON"),
        ("\x00\x00", "no JSON"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_erased(
    change: dict[str, Any] | str, says: str, tmp_path: Path
) -> None:
    finish(tmp_path)
    file = answers_file(tmp_path)
    lines = file.read_bytes().split(b"\n")
    lines[3] = (change if isinstance(change, str) else json.dumps({**json.loads(lines[3]), **change})).encode()
    damaged = b"\n".join(lines)
    file.write_bytes(damaged)
    with pytest.raises(trio.InputError) as caught:
        AnswerFiles(tmp_path, {"a": 1}).read("row", "key", BATCHES)
    assert f"answers {str(file)!r}, line 4: " in str(caught.value) and says in str(caught.value)
    assert "remove that file" in str(caught.value)
    assert file.read_bytes() == damaged


def test_more_answers_than_questions_are_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(trio.InputError, match="line 13: found an answer to question 12, but nothing more is asked"):
        AnswerFiles(tmp_path, {"a": 1}).read("row", "key", BATCHES[:4])


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = AnswerFiles(tmp_path, {})
    files.add("row", "key", ANSWERS[0])
    before = answers_file(tmp_path).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonlines.os, "fsync", full)
    with pytest.raises(trio.InputError, match=r"row-.*jsonl.*No space left on device"):
        files.add("row", "key", ANSWERS[1])
    assert answers_file(tmp_path).read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "1" * 5000, "\xff"])
def test_a_damaged_header_is_refused(content: str, tmp_path: Path) -> None:
    AnswerFiles(tmp_path, {"a": 1})
    (tmp_path / "header.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(trio.InputError, match=r"header .*header\.json': no JSON object; give another --out"):
        AnswerFiles(tmp_path, {"a": 1})


def test_answers_without_a_header_are_not_taken_over(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "header.json").unlink()
    with pytest.raises(trio.InputError, match=r"it holds answers, but no header\.json"):
        AnswerFiles(tmp_path, {"a": 1})


def test_questions_and_prompts_with_odd_line_breaks(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    texts = [text for text in TEXTS if text.strip()]
    rows = [{"image": "a.png", "question": text, "answer": text} for text in texts]
    file = tmp_path / "q.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as an editor on Windows writes it
    assert [(one.question, one.answers) for one in jsonl(file).samples] == [(text, (text,)) for text in texts]
    pairs = tmp_path / "p.jsonl"
    pairs.write_text("\n".join(json.dumps({"image": "a.png", "prompt": t}, ensure_ascii=False) for t in texts))
    assert [one.prompt for one in read_samples(tmp_path, pairs)] == texts
    plain = tmp_path / "p.txt"
    plain.write_bytes("one\u2028two\r\nthree\x85four\n".encode())
    assert [one.prompt for one in read_samples(tmp_path, plain)] == ["one\u2028two", "three\x85four"]


def test_pipes_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(trio.InputError, match=r"cannot be read .*not a plain file"):
            jsonl(file)
        with pytest.raises(trio.InputError, match=r"cannot be read .*not a plain file"):
            read_samples(tmp_path, file)
    with pytest.raises(trio.InputError, match="cannot be read"):
        jsonl("a\0b")


def test_names_of_images_that_no_system_has(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 5000):
        file = tmp_path / "q.jsonl"
        file.write_text(json.dumps({"image": name, "question": "?", "answer": "x", "prompt": "?"}))
        with pytest.raises(trio.InputError, match="line 1: there is no image"):
            read_samples(tmp_path, file)
        file.write_text(json.dumps({"image": name, "question": "?", "answer": "x"}))
        with pytest.raises(trio.InputError, match="line 1: there is no image"):
            jsonl(file)
