"""The Python blocks of every page run, each page from the top: what a block needs beside that, it says in a comment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_examples import blocks, run_page

import trio
from trio.core.images import prompt_for

ROOT = Path(trio.__file__).parent.parent
DOCS = ROOT / "docs"
#: Pages run here, with what is made smaller.
PAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "choose-a-spec": (),
    "cost": (),
    "documents": (),
    "evaluation": (("limit=50", "limit=1"),),
    "serving": (),
    "shapesvqa": (),
    "testing": (),
    "vllm": (),
    "where-it-hurts": (),
    "zoo": (),
}
#: Pages whose code other tests run, with more to say about it.
ELSEWHERE = {
    "add-a-compressor": "test_examples.py",
    "add-a-scorer": "test_examples.py",
    "add-a-selector": "test_examples.py",
    "add-an-adapter": "test_examples.py",
    "calibrate": "test_calibration.py",
    "concepts": "test_examples.py",
    "fidelity": "test_fidelity.py",
    "quick-start": "test_spec_docs.py",
    "scale": "integrations/test_ray_run.py",
    "towers": "test_towers_examples.py",
    "tune": "test_tuning.py",
    "write-a-spec": "test_docs_code.py",
}
QUICK_START = "from the quick start (quick-start.md)"


def names_for(page: str) -> dict[str, Any]:
    """What the page's blocks may use without making it: nothing, or the names of the quick start where they say so."""
    names: dict[str, Any] = {"__name__": f"docs_{page.replace('-', '_')}"}
    if any(QUICK_START in code for _, code in blocks(DOCS / f"{page}.md")):
        _, code = next(blocks(DOCS / "quick-start.md"))
        exec(compile(code, "quick-start.md", "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_the_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for shown, smaller in PAGES[page]:
        assert text.count(shown) == 1
        text = text.replace(shown, smaller)
    (tmp_path / f"{page}.md").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_page(tmp_path / f"{page}.md", names_for(page)) >= 1
    assert "FAILED" not in capsys.readouterr().out


def test_the_blocks_about_specs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file and the class that the page says it needs."""
    page = (DOCS / "write-a-spec.md").read_text(encoding="utf-8")
    file = re.search(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert file is not None and "# mine.yaml: the file above; MyScorer: a class of your own" in page
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(file[1], encoding="utf-8")

    class MyScorer(trio.Scorer):
        weight: float = 1.0

        def score(self, ctx: trio.LayerContext) -> Any:
            return ctx.at_visual(ctx.hidden.norm(dim=-1))

    monkeypatch.setattr(trio.SCORERS, "_parts", {**trio.SCORERS._parts, "my-scorer": MyScorer})
    model, processor = trio.zoo.load("tiny-qwen2.5-vl")
    text = prompt_for(processor, 1, "What is on the left?")
    image = Image.open(trio.zoo.demo_image()).convert("RGB").resize((168, 168))
    names: dict[str, Any] = {"MyScorer": MyScorer, "model": model, "processor": processor, "text": text, "image": image}
    assert run_page(DOCS / "write-a-spec.md", names) == 3
    assert names["inputs"]["image_grid_thw"].tolist() == [[1, 20, 18]]  # 9 by 10 tokens, as the page says
    assert names["spec"].stages[0].selector.name == "top-k"


def test_no_page_with_code_is_left_out() -> None:
    with_code = {page.stem for page in DOCS.rglob("*.md") if any(blocks(page))}
    assert with_code == PAGES.keys() | ELSEWHERE.keys() and not PAGES.keys() & ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8"), f"{test} does not name {page}"
