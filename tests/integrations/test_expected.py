"""The published table, and results of lmms-eval beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trio
from benchmarks.expected import HERE, ROWS, SOURCES, VANILLA, average_percent, compare, measured, published, spec_of
from trio.spec import shipped_specs

ROOT = Path(trio.__file__).parent.parent
RESULTS: dict[str, Any] = {
    "config": {"model_args": "pretrained=llava-hf/llava-1.5-7b-hf,spec=trio-llava-1.5-64,pad_to_square=True"},
    "results": {
        "pope": {"alias": "pope", "pope_f1_score,none": 0.85, "pope_accuracy,none": 0.1},
        "mme": {"mme_perception_score,none": 1400.0, "mme_cognition_score,none": 300.0},
        "textvqa_val": {"exact_match,none": 0.43},
        "gqa": {"exact_match_stderr,none": 0.1},
    },
}


def test_the_table_s_average_is_the_mean_percentage() -> None:
    table = published()
    assert len(table) == 28
    off = {
        row: average_percent(scores, table[VANILLA], list(SOURCES)) - scores["average_percent"]
        for row, scores in table.items()
    }
    assert off.pop(("64 tokens, without encoder", "FastV")) == pytest.approx(-0.45, abs=0.01)  # as published
    assert max(map(abs, off.values())) < 0.11  # the scores are rounded


def test_every_spec_has_its_row_and_its_count() -> None:
    assert set(ROWS) - {"none"} <= set(shipped_specs())
    for name, row in ROWS.items():
        assert row in published()
        if name != "none":
            assert row[0].startswith(f"{name.rpartition('-')[2]} tokens")


def test_scores_in_the_table_s_units() -> None:
    found = measured(RESULTS)
    assert found.keys() == {"pope", "mme", "textvqa"}
    assert found["pope"] == (pytest.approx(85.0), "")
    assert found["mme"] == (1700.0, "")
    assert "OCR" in found["textvqa"][1]
    with_ocr = {"results": RESULTS["results"] | {"textvqa_val_ocr": {"exact_match,none": 0.55}}}
    assert measured(with_ocr)["textvqa"] == (pytest.approx(55.0), "")


def test_beside_each_other() -> None:
    lines = {line.column: line for line in compare(measured(RESULTS), ROWS[spec_of(RESULTS)])}
    assert (lines["pope"].published, lines["pope"].measured) == (84.3, pytest.approx(85.0))
    assert lines["gqa"].measured is None
    with pytest.raises(trio.TrioError, match="no '64 tokens/NoSuch'"):
        compare({}, ("64 tokens", "NoSuch"))


def test_which_spec() -> None:
    assert spec_of({"config": {"model_args": {"spec": "my/own-spec.yaml"}}}) == "own-spec"
    with pytest.raises(trio.TrioError, match="names no spec"):
        spec_of({"config": {"model_args": "pretrained=x"}})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.expected", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    files = tmp_path / "trio_results.json", tmp_path / "full_results.json", tmp_path / "own_results.json"
    files[0].write_text(json.dumps(RESULTS))
    files[1].write_text(
        json.dumps({"config": {"model_args": "spec=none"}, "results": {"pope": {"pope_f1_score,none": 1.0}}})
    )
    done = run(files[0], files[1])
    assert done.returncode == 0, done.stderr
    printed = [line.strip(" │").split("│") for line in done.stdout.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in printed]
    assert ["pope", "84.3", "85.0", "+0.7"] in cells
    assert ["% of the full model, mean of 1", "98.1", "85.0", "-13.1"] in cells
    assert ["gqa", "58.0", "not run", ""] in [[*line, ""][:4] for line in cells]
    files[2].write_text(json.dumps({"config": {"model_args": "spec=mine.yaml"}, "results": {}}))
    refused = run(files[2])
    assert (refused.returncode, "--row" in refused.stderr) == (2, True)
    assert run(files[2], "--row", "64 tokens, without encoder/FastV").returncode == 0


def test_the_page_has_a_command_for_every_row() -> None:
    page = (ROOT / "docs" / "lmms-eval.md").read_text()
    for name in ROWS:
        assert f"spec={name}," in page
    assert (HERE / "llava-system-prompt.txt").is_file()
