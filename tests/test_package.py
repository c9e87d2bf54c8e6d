"""The distribution: what the wheel holds, and what pyproject promises."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import trio

ROOT = Path(trio.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the tree as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    assert file.name == f"trio_vlm-{trio.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "trio").rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} <= set(wheel.namelist())
    assert {"trio/py.typed", "trio/spec/shipped/trio-11.yaml"} <= set(wheel.namelist())
    assert not [name for name in wheel.namelist() if not name.startswith(("trio/", "trio_vlm-"))]
    assert not [name for name in wheel.namelist() if "__pycache__" in name or name.startswith("trio/tests")]


def test_the_wheel_holds_the_zoo(wheel: zipfile.ZipFile) -> None:
    for name in trio.zoo.names():
        files = {path.name for path in trio.zoo.path(name).iterdir()}
        packed = {Path(one).name for one in wheel.namelist() if one.startswith(f"trio/zoo/models/{name}/")}
        assert files == packed
        assert sum(path.stat().st_size for path in trio.zoo.path(name).iterdir()) <= 12 * 2**20


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [one for one in wheel.namelist() if one.endswith("METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "trio-vlm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Requires-Dist: transformers<6,>=5.17" in str(metadata) or "transformers>=5.17,<6" in str(metadata)
    (entry,) = [one for one in wheel.namelist() if one.endswith("entry_points.txt")]
    assert "trio = trio.cli:app" in wheel.read(entry).decode()


def test_torch_has_no_upper_pin() -> None:
    (torch,) = [line for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert "<" not in torch
    assert "==" not in torch


def test_the_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"flash", "timm", "open-clip", "plot", "dev"} <= set(extras)
    dev = {line.partition(">")[0] for line in extras["dev"]}
    assert {"timm", "open_clip_torch", "pytest", "hypothesis", "ruff", "mypy", "peft", "accelerate"} <= dev


def test_one_version() -> None:
    assert "version" not in PROJECT
    assert f"version: {trio.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_readme_s_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    for said in ("make demo", "make test", "pip install trio-vlm", "cannot share an environment"):
        assert said in first
