"""One word for one thing: the words of docs/concepts.md in the package, and class names that are there once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import trio

PACKAGE = Path(trio.__file__).parent
REPOSITORY = Path(__file__).parents[1]
TEXTS = sorted(file for file in PACKAGE.rglob("*") if file.suffix in {".py", ".yaml", ".md", ".txt", ".html"})
#: The value of the scorer `objective-gradient`: published specs and committed results hold it.
SPEC_VALUE = "after-picture"
#: Prompts are data: other words are other tokens, and with them other measurements.
PROMPTS = {
    "measure/fidelity/samples.py": "Describe this picture in one or two sentences.",
    "testing/bench.py": '"What is in the picture", "No picture at all" and "before the picture comes" are prompts',
}
PICTURE = re.compile("picture", re.IGNORECASE)


def lines_with_picture(text: str) -> list[str]:
    """The lines that say picture beside the spec value."""
    return [line.strip() for line in text.splitlines() if PICTURE.search(line.replace(SPEC_VALUE, ""))]


def test_the_word_is_found_beside_the_spec_value() -> None:
    assert lines_with_picture("rows: after-picture\nA Picture, after-picture\nis_picture") == [
        "A Picture, after-picture",
        "is_picture",
    ]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_an_image_is_called_an_image(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    lines = [line for line in lines_with_picture(file.read_text()) if not is_prompt(name, line)]
    assert lines == [], f"{name}: say image"
    assert not PICTURE.search(file.name)


def is_prompt(name: str, line: str) -> bool:
    """Whether a line is a prompt for a model."""
    return name in PROMPTS and bool(re.match(r"[A-Z]+ = (Prompt\()?\"", line))


def test_every_exception_is_needed() -> None:
    for name in PROMPTS:
        assert any(is_prompt(name, line) for line in lines_with_picture((PACKAGE / name).read_text())), name


def test_no_two_classes_have_one_name() -> None:
    files = [file for folder in ("trio", "lab", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")]
    names = Counter(
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []
