"""One command a row of the paper's tables; the run by lmms-eval itself is in test_lmms_eval_run.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner

from benchmarks import paper
from benchmarks.expected import ALL_SOURCES, HERE, SOURCES
from benchmarks.expected.tables import TABLES
from trio import zoo
from trio.errors import InputError
from trio.spec import load_spec, shipped_specs

NEXT = TABLES["llava-next"]


def command() -> Any:
    import typer

    app = typer.Typer()
    app.command()(paper.main)
    return app


def called(*arguments: object) -> Any:
    return CliRunner().invoke(command(), [*map(str, arguments)])


def results(spec: str, score: float, seconds: float, **more: float) -> dict[str, Any]:
    speed = {"total_elapsed_time": seconds, "total_gen_tokens": 20, **more}
    return {
        "config": {"model_args": f"spec={spec}"},
        "results": {"pope": {"pope_f1_score,none": score}},
        "n-samples": {"pope": {"original": 10, "effective": 10}},
        "throughput": speed,
    }


def cells(table: Any) -> dict[str, list[str]]:
    console = Console(width=120, record=True)
    console.print(table)
    lines = [line.strip(" │").split("│") for line in console.export_text().splitlines() if "│" in line]
    return {line[0].strip(): [*(cell.strip() for cell in line[1:]), ""][:3] for line in lines}


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_rows_name_shipped_specs_and_columns_that_are_known(table: Any) -> None:
    assert table.rows["full"].spec == "none"
    assert {row.spec for row in table.rows.values()} - {"none"} <= set(shipped_specs())
    assert set(table.columns) <= set(ALL_SOURCES)
    for name, row in table.rows.items():
        if row.key is not None:
            assert table.scores(row), name
        if row.spec != "none":
            load_spec(row.spec)


def test_the_first_row_is_the_headline() -> None:
    name, row = next(iter(next(iter(TABLES.values())).rows.items()))
    assert (name, NEXT.scores(row)["average_percent"]) == ("trio-320", 97.2)
    assert row.cost is not None and (row.cost.prefill, row.cost.total, row.cost.flops, row.cost.kv) == (
        2.75,
        2.14,
        6.22,
        6.05,
    )


def test_a_row_beside_what_was_published() -> None:
    """Percents of the full model, speed from the same runs, counted costs of the checkpoint's own shape."""
    config = AutoConfig.from_pretrained(zoo.path("tiny-llava-next"))
    found = {"pope": results("trio-11", 0.80, 5.0, avg_visual_tokens=448.0, avg_retention=0.111)}
    row = paper.PaperRow("trio-11", ("320 tokens, without encoder", "TRIO"), NEXT.rows["trio-320"].cost)
    shown = cells(paper.report(NEXT, row, found, {"pope": results("none", 0.86, 20.0)}, config))
    assert shown["pope"] == ["84.5", "80.0", "-4.5"]
    assert not any(shown["gqa"])
    assert shown["% of the full model, mean of 1"] == ["97.2 of 8", "93.0", ""]
    assert shown["time of an answer"][:2] == ["2.14x", "4.00x"]
    assert shown["visual tokens kept"][1] == "49.7 of 448.0"
    assert shown["KV cache"][0] == "6.05x" and 1 < float(shown["KV cache"][1][:-1]) < 9
    assert float(shown["FLOPs by FastV's formula"][1][:-1]) > float(shown["FLOPs of the whole model"][1][:-1]) > 1


def test_the_published_mean_is_compared_where_its_columns_are_there() -> None:
    config = AutoConfig.from_pretrained(zoo.path("tiny-llava-next"))
    everything: dict[str, Any] = {}
    for sources in SOURCES.values():
        everything[sources[0].task] = {f"{metric},none": 0.5 for metric in sources[0].metrics}
    full = {"all": {"results": everything}}
    shown = cells(paper.report(NEXT, NEXT.rows["trio-320"], full, full, config))
    assert shown["% of the full model, mean of 8"] == ["97.2", "100.0", "+2.8"]


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def fake(arguments: list[str], **_: Any) -> None:
        folder = Path(arguments[arguments.index("--output_path") + 1])
        runs.append(folder.name)
        if folder.name == "pope":
            (folder / "model").mkdir()
            (folder / "model" / "2026_results.json").write_text(json.dumps(results("trio-11", 0.8, 5.0)))

    monkeypatch.setattr(paper.subprocess, "run", fake)
    options = ("--model", zoo.path("tiny-llava-next"), "--out", tmp_path, "--column", "pope")
    for _ in range(2):
        done = called(*options)
        assert done.exit_code == 0, done.output
        assert "run --row full too" in " ".join(done.output.split())
    assert runs == ["pope"]
    for other in (("--limit", 5), ("--model-args", "dtype=float16"), ("--model", zoo.path("tiny-llava"))):
        refused = called(*options, *other)
        assert refused.exit_code == 2 and "give another --out" in refused.output
    assert runs == ["pope"]
    failed = called(*options, "--column", "gqa")
    assert failed.exit_code == 2 and "task gqa: lmms-eval gave no results" in failed.output


def test_commands_are_printed() -> None:
    done = called("--model", "m", "--table", "qwen2.5-vl", "--row", "trio-11", "--dry-run", "--limit", 8)
    lines = done.output.strip().splitlines()
    assert len(lines) == len(TABLES["qwen2.5-vl"].columns)
    assert lines[0].startswith("python -m lmms_eval --model trio --model_args pretrained=m,spec=trio-qwen2.5-vl-11 ")
    assert all("--limit 8" in line and str(HERE / "tasks") in line for line in lines)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--table", "llava-nxt"), "Did you mean 'llava-next'"),
        (("--row", "trio-32"), "Did you mean 'trio-320'"),
        (("--column", "pop"), "Did you mean 'pope'"),
    ],
)
def test_wrong_names(options: tuple[str, ...], match: str) -> None:
    done = called("--model", "m", *options)
    assert done.exit_code == 2 and match in " ".join(done.output.split())


def test_a_run_without_results_says_where_to_look(tmp_path: Path) -> None:
    job = paper.Job("pope", ("--model", "trio"), tmp_path / "pope", {})
    with pytest.raises(InputError, match=r"lmms-eval gave no results \(.*\); see .*log\.txt"):
        paper.run(job)  # without its arguments, or without lmms-eval
