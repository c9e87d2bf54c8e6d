"""What the commands write: nothing that exists is overwritten, and nothing steers the terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from trio.cli import app, common
from trio.cli.common import check_outputs, print_json, say, unused, writable, write_text
from trio.cli.tables import console
from trio.core.printable import visible
from trio.errors import InputError
from trio.measure.evaluation import job

#: Clears the screen, rings, recolours, and turns the direction of the line.
HOSTILE = "a\x1b[2J\x07\x9b31m\u202eb\x7f"


def trio_(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


class Loaded(Exception):
    """The model was loaded: too late for a refusal."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded here; files with default names are not written into the repository."""

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(common, "load_model", load)
    monkeypatch.setattr(job, "load_model", load)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "p.png")


RUN = ["run", "-i", "p.png", "-q", "?"]
TUNE = ["tune", "tiny-llava", "-t", "tokens<=11%", "--images", "images"]
FIDELITY = ["fidelity", "tiny-llava", "--images", "images"]
CALIBRATE = ["calibrate", "tiny-llava", "--images", "images"]
WRITING = [
    ([*RUN, "-o", "out.png"], "--out"),
    ([*TUNE, "-o", "out.yaml"], "--out"),
    ([*TUNE, "-o", "best.yaml", "--plot", "out.png"], "--plot"),
    ([*FIDELITY, "--out", "out.json"], "--out"),
    ([*CALIBRATE, "-o", "out.yaml"], "--out"),
    ([*FIDELITY, "--plot", "out.png"], "--plot"),
]


@pytest.mark.parametrize(("args", "option"), WRITING)
def test_an_existing_file_is_refused_before_the_model_is_loaded(args: list[str], option: str) -> None:
    target = Path(args[-1])
    assert isinstance(trio_(*args).exception, Loaded)  # a new name goes on
    target.write_text("mine")
    result = trio_(*args)
    assert result.exit_code == 2
    said = f"trio: {option} '{target}': this file exists and would be overwritten; give another name, or add --force.\n"
    assert result.stderr == said
    assert isinstance(trio_(*args, "--force").exception, Loaded)
    assert target.read_text() == "mine"  # until there is something to write
    target.unlink()
    target.symlink_to("nowhere")
    assert trio_(*args).exit_code == 2


def test_files_that_cannot_be_written_are_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for args, option in WRITING:
        missing = [*args[:-1], f"missing/{args[-1]}"]
        assert f"{option} 'missing/{args[-1]}': there is no folder" in trio_(*missing).stderr
    assert "this is a folder" in trio_(*FIDELITY, "--out", "images").stderr
    assert "--plot 'x.png': --out names the same file" in trio_(*TUNE, "-o", "x.png", "--plot", "x.png").stderr
    assert "has to end in .png, .pdf or .svg" in trio_(*TUNE, "-o", "x", "--plot", "x.docx").stderr
    assert "has to end in .png, .pdf or .svg" in trio_(*FIDELITY, "--plot", "x.docx").stderr
    monkeypatch.setattr(common.os, "access", lambda _, mode, **__: mode != os.W_OK)
    assert "its rights forbid it" in trio_(*FIDELITY, "--out", "out.json").stderr


def test_our_own_name_makes_room() -> None:
    assert unused(Path("trio-overlay.png")) == Path("trio-overlay.png")
    Path("trio-overlay.png").write_text("mine")
    assert unused(Path("trio-overlay.png")) == Path("trio-overlay-2.png")
    Path("trio-overlay-2.png").symlink_to("nowhere")
    assert unused(Path("trio-overlay.png")) == Path("trio-overlay-3.png")
    assert isinstance(trio_(*RUN).exception, Loaded)


def test_devices_lose_nothing(tmp_path: Path) -> None:
    assert writable(Path(os.devnull), "--json") == Path(os.devnull)
    write_text(Path(os.devnull), "text", "--json")
    check_outputs({"--json": tmp_path / "new", "--out": None}, force=False)
    with pytest.raises(InputError, match=r"--json .*cannot be written"):
        write_text(tmp_path, "text", "--json")


def test_a_folder_with_other_results_is_refused() -> None:
    args = ["eval", "-s", "trio-11", "--no-html", "-o", "out"]
    assert isinstance(trio_(*args).exception, Loaded)
    Path("out").mkdir()
    assert isinstance(trio_(*args).exception, Loaded)
    for name in ("results.json", "results.csv", "report.html"):
        (Path("out") / name).write_text("mine")
        assert f"'out/{name}': this file exists" in trio_(*args).stderr
        assert isinstance(trio_(*args, "--force").exception, Loaded)
        (Path("out") / name).unlink()
    (Path("out") / "results.json").write_text("{}")
    (Path("out") / "header.json").write_text("{}")  # begun by a run: the header is compared
    assert isinstance(trio_(*args).exception, Loaded)
    assert "this is a file; give a folder" in trio_(*args[:-1], "p.png").stderr


# Control characters --------------------------------------------------------------------------------------------------


def test_what_is_printed_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("head")
    table.add_column(Text(HOSTILE))
    table.add_row(Text(HOSTILE), "cell")
    table.add_row("four", "cell")
    for shown in (Text(HOSTILE), table, HOSTILE):
        console().print(shown)
    say(f"{HOSTILE}\nsecond")
    say(HOSTILE, err=True)
    print_json({HOSTILE: [HOSTILE]})
    out, err = capsys.readouterr()
    assert visible(out) == out and visible(err) == err
    assert json.loads(out[out.rindex("{") :]) == {HOSTILE: [HOSTILE]}
    box = [line for line in out.split("\n") if line.startswith(("│", "┃", "┏", "└"))]
    assert len({len(line) for line in box}) == 1  # columns stay as they were laid out


def test_names_of_files_in_messages(tmp_path: Path) -> None:
    file = tmp_path / f"{HOSTILE}.yaml"
    assert visible(trio_("validate", file).stderr, keep="\n") == trio_("validate", file).stderr
    file.write_text(f"version: 1\ndescription: {json.dumps(HOSTILE)}\nstages: [{{after_layer: 1, keep: 3}}]\n")
    for command in (["validate", file], ["show", file], ["show", file, "--json"], ["show", file, "--yaml"]):
        result = trio_(*command)
        assert result.exit_code == 0, result.stderr
        assert visible(result.stdout) == result.stdout
        assert result.stdout
