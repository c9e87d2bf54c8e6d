"""The document probe: what is asked is drawn, and can be read; answers are judged as people would."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from support.documents import Reader
from typer.testing import CliRunner, Result

import trio
from benchmarks.documents import EXAMPLES
from trio.cli import app
from trio.measure.documents.answers import DocumentSample, number
from trio.measure.documents.page import DocumentQuestion, Mark, Page
from trio.measure.documents.task import ASKED, HINT, SEED, document, documents
from trio.measure.documents.words import date_answers
from trio.measure.evaluation.job import EvaluationJob
from trio.measure.evaluation.results import EvaluationResults
from trio.measure.evaluation.task import Task

#: SHA-256 of the questions; who changes them must raise `VERSION`, since results refer to them.
FINGERPRINTS = {
    ("test", 100): "fcf04dee5d56b3e9dc348433a11da48a789b5949d896a3a8ec83ae033b3d17cb",
    ("validation", 75): "dc1ce3b3b551be486dd13626bb3b14221c5950e0de40e52edabd0116ccab20fd",
}
DOCS = Path(trio.__file__).parents[1] / "docs"
Drawn = tuple[Page, list[DocumentQuestion]]


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return [document("test", 3, index) for index in range(48)]


@pytest.fixture(scope="module")
def task() -> Task:
    return documents(limit=120)


# What is asked is drawn


def test_every_answer_can_be_read_back_from_the_page(drawn: list[Drawn]) -> None:
    seen: Counter[str] = Counter()
    for page, questions in drawn:
        reader = Reader(page)
        for question in questions:
            read = reader.answer(question.kind, question.text)
            seen[question.kind] += 1
            if isinstance(read, str):
                assert read == question.answers[0], question.text
            else:
                two_pixels = 2 * abs(reader.scale()[0])
                expected = float(question.answers[0].replace(",", ""))
                assert abs(read - expected) <= two_pixels, question.text
    assert set(seen) == set(ASKED) and min(seen.values()) >= 12


def test_a_question_has_one_answer(drawn: list[Drawn]) -> None:
    for _, questions in drawn:
        assert len({question.text for question in questions}) == len(questions)


def test_the_numbers_of_an_invoice_fit_each_other(drawn: list[Drawn]) -> None:
    def cents(text: str) -> int:
        return round(100 * float(text.split()[-1].lstrip("$").replace(",", "")))

    for page, questions in drawn[::4]:
        lines = Reader(page).items()
        assert lines and all(int(count) * cents(price) == cents(amount) for count, price, amount in lines)
        totals = [cents(question.answers[0]) for question in questions if question.kind == "invoice-total"]
        assert sum(cents(amount) for *_, amount in lines) in totals
        assert 2 * max(totals) == sum(totals)  # the largest is the sum of the others


def overlaps(one: Mark, other: Mark) -> bool:
    a, b = one.box, other.box
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("dpi", [75, 100, 200])
def test_everything_is_on_the_page_and_nothing_on_anything_else(dpi: int) -> None:
    for index in range(16):
        page, _ = document("test", 5, index, dpi)
        for number_, mark in enumerate(page.marks):
            left, top, right, bottom = mark.box
            assert 0 <= left < right <= page.image.width and 0 <= top < bottom <= page.image.height, mark
            for other in page.marks[:number_]:
                assert not overlaps(mark, other), (mark, other)


def likeness(there: NDArray[np.float64], mark: Mark, text: str) -> float:
    """Correlation of what is there with a text that is struck once, or twice one pixel apart."""
    font = ImageFont.load_default(mark.pixels)
    alone = Image.new("L", (there.shape[1], there.shape[0]))
    inked = ImageDraw.Draw(alone).textbbox((0, 0), text, font=font)
    ImageDraw.Draw(alone).text((-inked[0], -inked[1]), text, fill=255, font=font)
    once = np.asarray(alone)
    twice = np.maximum(once, np.roll(once, 1, axis=1))
    return max(float(np.corrcoef(there.ravel(), one.ravel())[0, 1]) for one in (once, twice))


@pytest.mark.parametrize("dpi", [75, 100])
def test_every_text_is_drawn_as_written_and_large_enough_to_read(dpi: int) -> None:
    for index in range(12):
        page, _ = document("test", 7, index, dpi)
        grey = 255 - np.asarray(page.image.convert("L")).astype(float)
        for mark in page.marks:
            if mark.kind != "text":
                continue
            left, top, right, bottom = mark.box
            there = grey[top:bottom, left:right]
            assert mark.pixels >= 0.09 * dpi  # 6.5 points
            assert there.max() - there.min() >= 100
            written = likeness(there, mark, mark.text)
            assert written > 0.7, mark
            if len(set(mark.text)) > 3:
                assert written > likeness(there, mark, mark.text[::-1])


def test_the_map_shows_what_a_question_is_about(task: Task) -> None:
    for sample in task.samples[:60]:
        page, questions = document("test", task.facts["seed"], sample.scene)
        (question,) = [one for one in questions if f"{one.text}\n{HINT}" == sample.question]
        assert sample.item_map is not None and sample.item_map.shape == np.asarray(sample.load()).shape[:2]
        assert len(sample.about) == len(question.about)
        for thing, mark in zip(sample.about, question.about, strict=True):
            left, top, right, bottom = page.marks[mark].box
            assert (sample.item_map[top:bottom, left:right] == thing + 1).all()
        if sample.kind in ("form-choice", "table-cell", "table-maximum", "form-field", "invoice-item"):
            assert question.answers[0] in {page.marks[mark].text for mark in question.about}


# The same on every machine, and balanced


@pytest.mark.parametrize(("split", "dpi"), FINGERPRINTS)
def test_the_questions_do_not_change_between_releases(split: str, dpi: int) -> None:
    task = documents(split, limit=24, dpi=dpi)  # type: ignore[arg-type]  # a parameter of the test
    assert task.fingerprint() == FINGERPRINTS[split, dpi]


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib; from trio.measure.documents.task import document\n"
        "print(hashlib.sha256(b''.join(document('test', 1, i)[0].image.tobytes() for i in range(4))).hexdigest())"
    )
    paths = os.pathsep.join([str(Path(trio.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONHASHSEED": "11", "PYTHONPATH": paths}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    own = hashlib.sha256(b"".join(document("test", 1, i)[0].image.tobytes() for i in range(4)))
    assert other.stdout.strip() == own.hexdigest()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(task: Task) -> None:
    few = documents(limit=5)
    assert few.samples == task.samples[: len(few.samples)]
    assert few.samples[-1].load().tobytes() == task.samples[len(few.samples) - 1].load().tobytes()


def test_another_size_asks_the_same(task: Task) -> None:
    large = documents(limit=8, dpi=200)
    for one, other in zip(large.samples, task.samples, strict=False):
        assert (one.question, one.answers, one.about) == (other.question, other.answers, other.about)
        assert max(one.load().size) == pytest.approx(2 * max(other.load().size), abs=2)
    assert large.samples[0].load().size == (1653, 2339)  # A4 at 200 dpi


def test_splits_and_seeds_share_no_document() -> None:
    sets = [documents("test", limit=8), documents("validation", limit=8), documents("test", limit=8, seed=2)]
    images = [{sample.load().tobytes() for sample in one.samples} for one in sets]
    assert [len(one) for one in images] == [8, 8, 8] and len(set.union(*images)) == 24


def test_no_answer_is_right_often(task: Task) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in task.samples:
        answers[sample.kind][sample.answers[0]] += 1
    assert list(answers) == list(ASKED)
    for kind, counts in answers.items():
        if kind == "form-box":
            assert set(counts) == {"yes", "no"} and abs(counts["yes"] - counts["no"]) <= 1
        else:
            assert counts.most_common(1)[0][1] <= 0.2 * sum(counts.values()), kind


def test_the_place_of_an_answer_says_nothing(drawn: list[Drawn]) -> None:
    """The option that is ticked, the row of a maximum and the year of an extreme lie anywhere."""
    options: Counter[int] = Counter()
    thirds: dict[str, Counter[int]] = {"table-maximum": Counter(), "chart-extreme": Counter()}
    for page, questions in [*drawn, *(document("test", 4, index) for index in range(64) if index % 4)]:
        for question in questions:
            if question.kind == "form-choice":
                options[round((page.marks[question.about[1]].box[0] * 72 / page.dpi - 46) / 127)] += 1
            elif question.kind == "table-maximum" and question.text.startswith("Which"):
                column = sorted((page.marks[mark].box[1], mark) for mark in question.about[2:])
                key = page.marks[question.about[1]].box[1]
                thirds[question.kind][sum(top < key for top, _ in column) * 3 // len(column)] += 1
            elif question.kind == "chart-extreme":
                years = sorted(
                    {one.text for one in page.marks if one.text.startswith(("19", "20")) and len(one.text) == 4}
                )
                if question.answers[0] in years:
                    thirds[question.kind][years.index(question.answers[0]) * 3 // len(years)] += 1
    for counts, ways in ((options, 4), *((one, 3) for one in thirds.values())):
        assert len(counts) == ways and max(counts.values()) <= 1.6 * sum(counts.values()) / ways, counts


# When an answer is right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", 1234.5),
        ("$1234.50", 1234.5),
        ("EUR 1,234.5", 1234.5),
        ("1 234.50 eur", 1234.5),
        ("1,234.50 dollars.", 1234.5),
        ("41 mm", 41.0),
        ("41", 41.0),
        ("twelve", 12.0),
        ("19%", 19.0),
        ("-3", -3.0),
        ("the total is 41", None),
        ("12,34", None),
        ("41 or 42", None),
        ("", None),
        ("mm", None),
    ],
)
def test_a_number_is_read_whatever_stands_beside_it(text: str, value: float | None) -> None:
    assert number(text, "mm") == value


def test_tolerance_is_a_share_of_the_number() -> None:
    sample = DocumentSample(Image.new("RGB", (1, 1)), "?", ("200",), numeric=True, tolerance=0.05)
    assert [sample.is_right(text) for text in ("190", "210", "189", "211", "about 200")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    exact = DocumentSample(Image.new("RGB", (1, 1)), "?", ("1,200.50",), numeric=True)
    assert exact.is_right("1200.5") and not exact.is_right("1200.51") and not exact.is_right("1200")


def test_codes_are_no_numbers() -> None:
    sample = DocumentSample(Image.new("RGB", (1, 1)), "?", ("04103",))
    assert sample.is_right("04103.") and not sample.is_right("4103")


def test_a_date_may_be_written_in_other_ways() -> None:
    sample = DocumentSample(Image.new("RGB", (1, 1)), "?", date_answers(datetime.date(2023, 3, 4), "dotted"))
    for text in ("04.03.2023", "2023-03-04", "4 March 2023", "March 4, 2023", "Mar 4, 2023", "4 mar 2023"):
        assert sample.is_right(text), text
    assert not sample.is_right("3 April 2023") and not sample.is_right("03.04.2023")


def edits(one: str, two: str) -> int:
    """Levenshtein's distance by its definition."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(two, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def anls(answer: str, sample: DocumentSample) -> float:
    if sample.is_right(answer):
        return 1.0
    given = answer.strip().lower()
    best = max(1 - edits(given, one.lower()) / max(len(given), len(one)) for one in sample.answers)
    return best if best >= 0.5 else 0.0


@pytest.mark.parametrize(
    ("given", "value"), [("Hallvik", 1 - 1 / 7), ("halvik", 1.0), ("Hal", 0.5), ("Ha", 0.0), ("", 0.0)]
)
def test_anls_of_one_answer(given: str, value: float) -> None:
    sample = DocumentSample(Image.new("RGB", (1, 1)), "?", ("Halvik", "x"))
    assert sample.similarity(given) == pytest.approx(value) == anls(given, sample)


# From the command line


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def test_a_small_model_is_asked_about_documents(tmp_path: Path) -> None:
    """It was trained on nothing like it: all is measured, and nothing counts."""
    out = tmp_path / "out"
    given = ("--task", "documents", "--limit", "4", "--dpi", "75", "--speed-rounds", "0", "--no-html")
    result = trio_("--spec", "trio-11", *given, "--out", out)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "no sub-task passes the gate" in words and "documents test, 19 questions on 4 images" in words
    results = EvaluationResults.load(out / "results.json")
    assert results.kinds == list(ASKED) and not any(gate.passes for gate in results.gates)
    assert results.task["dpi"] == 75 and results.task["documents"] == 4
    assert all(not row.refused for row in results.rows if row.control == "oracle")
    samples = documents(limit=4, dpi=75).samples
    (file,) = [one for one in (out / "answers").iterdir() if one.name.startswith("full")]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    by_hand = [anls(line["text"], samples[line["question"]]) for line in lines]  # type: ignore[arg-type]
    assert results.row("full").anls["overall"].mean == pytest.approx(100 * np.mean(by_hand), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--split", "novel"], "split 'novel' is unknown; allowed: test, validation"),
        (["--limit", "1001"], "has 1000 documents; give 1 to 1000"),
        (["--dpi", "20"], "dpi 20 is out of range; give 75 to 200"),
        (["--data", "x.jsonl"], "data: documents draws its own images"),
        (["--task", "shapesvqa", "--dpi", "100"], "dpi: shapesvqa draws no documents"),
    ],
)
def test_mistakes_are_one_paragraph_and_cost_no_model(given: list[str], message: str, tmp_path: Path) -> None:
    result = trio_("--task", "documents", *given, "--model", "nothing", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Its page


def test_the_page_shows_what_is_asked() -> None:
    page = (DOCS / "documents.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z]+-[a-z]+)` \|", page, re.MULTILINE) == list(ASKED)
    for name, index in EXAMPLES.items():
        assert f"]({name})" in page and (DOCS / name).stat().st_size < 60_000
        with Image.open(DOCS / name) as shown:
            assert shown.size == document("test", SEED, index)[0].image.size
    known = {question.text for index in range(4) for question in document("test", SEED, index)[1]}
    for shown_question in (
        'What is the unit price of "Webcam"?',
        'What is in the column "Sales" for the branch Quarley?',
    ):
        assert shown_question in known and shown_question in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("asked.jsonl")}, "data: shapesvqa draws its own images"),
        ({"task": "jsonl"}, "data: missing"),
        ({"dpi": 100}, "dpi: shapesvqa draws no documents"),
        ({"task": "documents", "part": "counting"}, "slice: it is of the task shapesvqa, not of documents"),
    ],
)
def test_a_job_refuses_what_belongs_to_another_task(options: Any, message: str, tmp_path: Path) -> None:
    job = EvaluationJob((trio.load_spec("trio-11"),), tmp_path / "out", html=False, **options)
    with pytest.raises(trio.InputError, match=message):
        job.check()
