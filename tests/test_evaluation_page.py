"""`report.html` with hostile questions and names: nothing of them becomes markup, attribute or formula."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from trio.cli import app
from trio.measure.evaluation.overlays import Overlay
from trio.measure.evaluation.report import report_html
from trio.measure.evaluation.results import EvaluationResults

MARK = "hunter2"
ATTACKS = [
    f"</title><script>{MARK}()</script>",
    f'" onload="{MARK}()" x="',
    f"' onerror='{MARK}()",
    f"--><img src=x onerror={MARK}()><!--",
    f"]]></style><style>{MARK}</style>&lt;{MARK}&#60;",
    f"$\\{MARK}$ and $_{{$",
]
HOSTILE = " ".join(ATTACKS)


class Page(HTMLParser):
    """Everything of a page, sorted by what it became."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.markup: list[str] = []
        self.text = ""
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] in (["script"], ["style"]):
            self.markup.append(data)
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        # Drawn labels stand in comments, escaped: they may name the label, and must not end.
        assert "<" not in data and ">" not in data

    def unknown_decl(self, data: str) -> None:
        self.markup.append(data)

    handle_decl = handle_pi = unknown_decl


def write_spec(folder: Path, name: str) -> Path:
    file = folder / "hostile.yaml"
    spec = {"version": 1, "name": name, "stages": [{"after_layer": 0, "keep": "11.1%"}]}
    file.write_text(json.dumps(spec))
    return file


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    names = [f"{number}{HOSTILE.replace('/', '')[:200]}.png" for number in range(2)]
    for number, name in enumerate(names):
        Image.radial_gradient("L").rotate(90 * number).resize((168, 168)).convert("RGB").save(folder / name)
    data = folder / f"{HOSTILE.replace('/', '')[:200]}.jsonl"
    rows = [{"image": name, "question": HOSTILE, "answer": [HOSTILE], "kind": HOSTILE} for name in names]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["eval", "--task", "jsonl", "--data", data, "--max-new-tokens", "1", "--out", folder / "out"]
    given += ["--spec", write_spec(folder, HOSTILE), "--speed-rounds", "1"]
    result = CliRunner().invoke(app, [str(one) for one in given])
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="module", params=["as it was written", "the model's name, notes and device are hostile too"])
def page(request: pytest.FixtureRequest, out: Path) -> str:
    if request.param == "as it was written":
        return (out / "report.html").read_text(encoding="utf-8")
    results = EvaluationResults.load(out / "results.json")
    model = {**results.model, "name": HOSTILE, "class": HOSTILE, "dtype": HOSTILE}
    changed = results.model_copy(update={"model": model, "notes": [HOSTILE], "device": HOSTILE})
    return report_html(changed, [Overlay(HOSTILE, HOSTILE, HOSTILE, HOSTILE, False, "")])


def test_nothing_of_it_became_markup(page: str) -> None:
    found = Page()
    found.feed(page)
    found.close()
    assert "script" not in found.tags and found.tags.count("title") == 1
    assert {name for name, _ in found.attributes if name.startswith("on")} == set()
    assert not [value for _, value in found.attributes if MARK in value]
    assert not [text for text in found.markup if MARK in text]
    assert all(value.startswith(("data:", "#")) for name, value in found.attributes if name in ("src", "href"))


def test_all_of_it_is_there_to_read(page: str) -> None:
    found = Page()
    found.feed(page)
    assert f"“{HOSTILE}”" in found.text  # the question of a sample
    assert found.text.count(HOSTILE) >= 5  # the spec's name and the sub-task in the tables


def test_the_parser_sees_what_it_must_not_find() -> None:
    """The check itself: unescaped, every attack shows."""
    found = Page()
    found.feed(f'<p>{ATTACKS[0]}</p><img alt="{ATTACKS[1]}"><style>{MARK}</style>')
    assert "script" in found.tags
    assert ("onload", f"{MARK}()") in found.attributes
    assert MARK in found.markup
