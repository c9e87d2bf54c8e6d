"""The code and the specs in the documentation run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import trio
from trio.spec import load_spec
from trio.spec.schedule import resolve

DOCS = Path(trio.__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_spec_of_the_page_loads_and_keeps_its_promise(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(blocks("write-a-spec.md", "yaml")[0])
    schedule = resolve(load_spec(file), 32)
    schedule.check(576)
    assert schedule.average(576) == 64


def test_what_a_spec_means_is_as_written() -> None:
    code = blocks("write-a-spec.md", "python")[-1]
    names: dict[str, Any] = {"trio": trio}
    for line in code.splitlines():
        expression, _, said = line.partition("  # ")
        if said:
            assert repr(eval(expression, names)) == said
        else:
            exec(line, names)


def test_the_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("quick-start.md", "python")[0], {})
    answer, *summary = capsys.readouterr().out.splitlines()
    assert answer.strip()
    assert "trio-soft-11" in summary[0]


def test_the_error_of_the_page_is_the_real_one() -> None:
    code = blocks("quick-start.md", "python")[1]
    said = " ".join(code.partition("trio.errors.SpecError: ")[2].split())
    with pytest.raises(trio.SpecError) as caught:
        eval(code.splitlines()[0].removeprefix(">>> "), {"trio": trio})
    assert str(caught.value) == said
