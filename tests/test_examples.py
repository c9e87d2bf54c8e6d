"""The code of the documentation and the examples, run as written."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trio
from trio.adapters.base import ADAPTERS
from trio.core.context import SelectionContext
from trio.core.prompts import Prompt
from trio.encoders.compressors.base import COMPRESSORS
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS
from trio.testing import TokenInputs, check_adapter, check_compressor, check_scorer, check_selector, tiny_llava

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
#: Pages that begin with nothing: each block goes on where the one before it ended.
PAGES = ("add-a-scorer", "add-a-selector", "add-a-compressor", "add-an-adapter")


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is forgotten after the test."""
    for registry in (SCORERS, SELECTORS, COMPRESSORS, ADAPTERS):
        registry.names()
        for attribute in ("_parts", "_aliases", "_sources"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, with the lines on which they begin."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n") + 1, match[1]


def run_page(page: Path, names: dict[str, Any]) -> int:
    """Runs the blocks of a page in order; a block with a prompt must raise what it shows."""
    found = list(blocks(page))
    for line, code in found:
        if not code.startswith(">>> "):
            exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), names)
            continue
        statement, _, shown = code.removeprefix(">>> ").partition("\n")
        with pytest.raises(trio.TrioError) as raised:
            exec(compile(statement, str(page), "exec", dont_inherit=True), names)
        error = f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}"
        assert error.split() == shown.split(), f"{page.name}, line {line}"
    return len(found)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(name: str) -> None:
    assert run_page(ROOT / "docs" / f"{name}.md", {"__name__": f"docs_{name.replace('-', '_')}"}) >= 2


def test_the_code_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model, inputs = tiny_llava(layers=32), dict(TokenInputs()([Prompt("What is in", 1, "?")]))
    loaded = {"AutoModelForImageTextToText": model, "AutoProcessor": None}
    for cls, value in loaded.items():  # the checkpoint of the hub
        monkeypatch.setattr(getattr(transformers, cls), "from_pretrained", lambda *a, value=value, **k: value)

    class MyScorer(trio.Scorer):
        def score(self, ctx: trio.LayerContext) -> Any:
            return ctx.at_visual(ctx.hidden.norm(dim=-1))

    names = {"inputs": inputs, "MyScorer": MyScorer}
    assert run_page(ROOT / "README.md", names) >= 2
    assert names["pipeline"].spec.stages[0].keep.share == "11.1%"


def test_the_values_that_concepts_shows() -> None:
    """Each line of a block that is an expression with a comment that begins like a value has that value."""
    names: dict[str, Any] = {}
    shown = 0
    for _, code in blocks(ROOT / "docs" / "concepts.md"):
        exec(compile(code, "concepts", "exec", dont_inherit=True), names)
        for expression, value in re.findall(r"^([a-z][^=#\n]*?)  # ((?:[\[(\d]|torch).*)$", code, re.MULTILINE):
            assert repr(eval(expression, names)) == value, expression
            shown += 1
    assert shown == 8


def test_my_scorer_is_found_by_name_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "my_scorer.py"), run_name="my_scorer")
    assert SCORERS.get("contrast") is module["Contrast"]
    assert check_scorer("contrast").passed
    for weight in (0.0, 1.0):
        assert check_scorer(module["Contrast"](prompt_weight=weight)).passed
    with pytest.raises(trio.SpecError, match=r"prompt_weight.*1\.5.*less than or equal to 1"):
        SCORERS.build({"name": "contrast", "prompt_weight": 1.5})
    module["main"]()
    printed = capsys.readouterr().out
    assert "48 of 144" in printed
    assert "FAILED" not in printed


def test_my_scorer_scores_what_it_says() -> None:
    """With the weight at 0 the token that resembles the average least wins, at 1 the one most like the last token."""
    import torch

    contrast = runpy.run_path(str(EXAMPLES / "my_scorer.py"), run_name="my_scorer")["Contrast"]
    model = tiny_llava()
    inputs = dict(TokenInputs()([Prompt("What is in", 1, "?")]))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0]
    visual = hidden[inputs["input_ids"][0] == 99]
    expected = {
        0.0: -torch.cosine_similarity(visual, visual.mean(0)[None]),
        1.0: torch.cosine_similarity(visual, hidden[-1:]),
    }
    for weight, wanted in expected.items():
        stage = trio.Stage(after_layer=2, keep=4, scorer=contrast(prompt_weight=weight), selector="top-k")
        found = trio.Pipeline(model, stages=[stage]).score(inputs)[0][0]
        assert torch.allclose(found - found.mean(), wanted - wanted.mean(), atol=1e-5)


def test_my_scorer_as_an_entry_point(tmp_path: Path) -> None:
    """Published as the page says, it is found in a fresh interpreter without an import."""
    info = tmp_path / "my_package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[trio.scorers]\ncontrast = my_scorer:Contrast\n")
    (tmp_path / "my_scorer.py").write_text((EXAMPLES / "my_scorer.py").read_text())
    spec = {"version": 1, "stages": [{"after_layer": 1, "keep": 8, "scorer": {"name": "contrast", "prompt_weight": 1}}]}
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        f"import trio; trio.load_spec({spec!r}).check_parts()\n"
        "print(trio.SCORERS.describe('contrast').source)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout.strip() == "my-package 1.2", done.stderr


def test_my_compressor_is_found_by_name_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "my_compressor.py"), run_name="my_compressor")
    assert COMPRESSORS.get("top-and-rest") is module["TopAndRest"]
    assert check_compressor("top-and-rest").passed
    module["main"]()
    printed = capsys.readouterr().out
    assert "top-and-rest: 48 of 144" in printed
    assert "FAILED" not in printed


def test_my_compressor_keeps_and_averages_what_it_says() -> None:
    import torch

    from trio.core.tokens import ImageTokens, VisualTokens

    compressor = runpy.run_path(str(EXAMPLES / "my_compressor.py"), run_name="my_compressor")["TopAndRest"]()
    attention = torch.tensor([0.1, 0.3, 0.05, 0.2, 0.15])
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.start(features, ImageTokens.from_grid(1, 5), {compressor.reads()[0]: attention})
    out = compressor.compress(tokens, 3)
    assert out.token_index.tolist() == [1, 3, 4] and out.sizes.tolist() == [1, 1, 3]
    expected = torch.stack([features[1], features[3], features[[0, 2, 4]].mean(0)])
    torch.testing.assert_close(out.features, expected)


def test_my_selector_is_found_by_name_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(EXAMPLES / "my_selector.py"), run_name="my_selector")
    assert SELECTORS.get("cells") is module["Cells"]
    for cells in (1, 2, 64):
        assert check_selector(module["Cells"](cells=cells)).passed
    module["main"]()
    printed = capsys.readouterr().out
    assert "48 of 144" in printed
    assert "FAILED" not in printed


def test_my_selector_takes_turns_as_it_says() -> None:
    """Two cells to the left and right of the middle, and a second image: one of each, then the second ones."""
    import torch

    cells = runpy.run_path(str(EXAMPLES / "my_selector.py"), run_name="my_selector")["Cells"](cells=2)
    saliency = torch.tensor([[0.7, 0.9, 0.8, 0.1, 0.2, 0.0]])
    unknown = SelectionContext.start(saliency, torch.zeros(1, 6, 4), torch.tensor([2]))
    column, image = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.1, 0.6]]), torch.tensor([[0, 0, 0, 0, 1, 0]])
    ctx = replace(unknown, origins=replace(unknown.origins, row=torch.zeros(1, 6), column=column, image=image))
    chosen = [cells.select(replace(ctx, k=torch.tensor([k])))[0][0] for k in range(6)]
    assert [row.tolist() for row in chosen] == [[], [1], [1, 4], [1, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert cells.select(unknown)[0].tolist() == [[1, 2]]  # one cell


@pytest.mark.parametrize("part", ["scorer", "selector", "compressor"])
def test_the_page_shows_my_part_as_it_is(part: str) -> None:
    """The page leaves out docstrings of the method and of the module, nothing else."""
    (_, shown), *_ = blocks(ROOT / "docs" / f"add-a-{part}.md")
    whole = (EXAMPLES / f"my_{part}.py").read_text()
    for line in filter(None, map(str.strip, shown.splitlines())):
        assert line in whole


def test_my_adapter_keeps_the_promises() -> None:
    """What the example's own main runs, without the slowest group of promises."""
    module = runpy.run_path(str(EXAMPLES / "my_adapter.py"), run_name="my_adapter")
    model = module["tiny_model"]()
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep=4)])
    assert type(pipeline.adapter) is module["VipLlavaAdapter"]
    assert pipeline.adapter_name == "vip-llava"
    inputs = TokenInputs(image_token=99, image_tokens=16, image_shape=(3, 16, 16))
    results = check_adapter(model, inputs, promises=["identity", "reversibility", "decode", "batch", "nothing-lost"])
    assert len(results) >= 20


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
