"""The distributions: what the wheels hold, that the small one runs alone, and what pyproject promises."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import trio_vlm_zoo

import trio
from trio import zoo

ROOT = Path(trio.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ZOO = tomllib.loads((ROOT / "zoo" / "pyproject.toml").read_text())["project"]


def built(project: Path, folder: Path, name: str) -> zipfile.ZipFile:
    """A wheel, built from the tree as it is."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    assert file.name == f"{name}-{trio.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the package."""
    return built(ROOT, tmp_path_factory.mktemp("wheel"), "trio_vlm")


@pytest.fixture(scope="module")
def zoo_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the other trained models."""
    return built(ROOT / "zoo", tmp_path_factory.mktemp("zoo"), "trio_vlm_zoo")


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as the wheel installs it."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def alone(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command `trio` of an unpacked wheel, where `trio-vlm-zoo` is not installed."""
    code = f"""
import sys
sys.modules["trio_vlm_zoo"] = None
import trio.cli
assert trio.__file__.startswith({str(site)!r})
trio.cli.app({list(arguments)!r}, prog_name="trio")
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "trio").rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} <= set(wheel.namelist())
    assert {"trio/py.typed", "trio/spec/shipped/trio-11.yaml"} <= set(wheel.namelist())
    assert not [name for name in wheel.namelist() if not name.startswith(("trio/", "trio_vlm-"))]
    assert not [name for name in wheel.namelist() if "__pycache__" in name or name.startswith("trio/tests")]


def test_the_wheel_is_small_and_holds_one_model(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None and Path(wheel.filename).stat().st_size < 7_000_000
    assert models(wheel, "trio/zoo/models/") == {"tiny-llava"}


def test_the_other_wheel_holds_the_other_models(zoo_wheel: zipfile.ZipFile) -> None:
    here = {str(path.relative_to(ROOT / "zoo")) for path in (ROOT / "zoo" / "trio_vlm_zoo").rglob("*")}
    packed = {name for name in zoo_wheel.namelist() if not name.startswith("trio_vlm_zoo-")}
    assert packed == {name for name in here if (ROOT / "zoo" / name).is_file() and "__pycache__" not in name}
    assert models(zoo_wheel, "trio_vlm_zoo/models/") == set(zoo.SEPARATE)


def models(wheel: zipfile.ZipFile, below: str) -> set[str]:
    """The models of a wheel; each is whole."""
    files: dict[str, set[str]] = {}
    for name in wheel.namelist():
        if name.startswith(below):
            model, _, file = name.removeprefix(below).partition("/")
            files.setdefault(model, set()).add(file)
    assert all({"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= each for each in files.values())
    return set(files)


def test_the_wheel_alone_runs_the_demo(unpacked: Path, tmp_path: Path) -> None:
    done = alone(unpacked, "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FLOPs" in done.stdout and (tmp_path / "trio-overlay.png").is_file()


@pytest.mark.parametrize("name", zoo.SEPARATE)
def test_the_wheel_alone_says_what_has_the_other_models(unpacked: Path, tmp_path: Path, name: str) -> None:
    done = alone(unpacked, "run", "--model", name, cwd=tmp_path)
    assert done.returncode == 2
    assert "distribution trio-vlm-zoo, which is not installed" in " ".join(done.stderr.split())


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [one for one in wheel.namelist() if one.endswith("METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "trio-vlm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Requires-Dist: transformers<6,>=5.17" in str(metadata) or "transformers>=5.17,<6" in str(metadata)
    (entry,) = [one for one in wheel.namelist() if one.endswith("entry_points.txt")]
    for line in ("trio = trio.cli:app", "trio-vlm = trio.cli:app"):
        assert line in wheel.read(entry).decode().splitlines()


def test_the_zoo_s_metadata(zoo_wheel: zipfile.ZipFile) -> None:
    """It needs no distribution: it serves the one that is imported as trio_vlm as well."""
    assert ZOO["name"] == "trio-vlm-zoo" and not ZOO.get("dependencies")
    assert ZOO["requires-python"] == PROJECT["requires-python"] and ZOO["license"] == PROJECT["license"]
    assert (ROOT / "zoo" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not [name for name in zoo_wheel.namelist() if name.endswith("entry_points.txt")]


def test_torch_has_no_upper_pin() -> None:
    (torch,) = [line for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert "<" not in torch
    assert "==" not in torch


def test_the_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"flash", "timm", "open-clip", "plot", "zoo", "dev"} <= set(extras)
    dev = {line.partition(">")[0] for line in extras["dev"]}
    assert {"timm", "open_clip_torch", "pytest", "hypothesis", "ruff", "mypy", "peft", "accelerate"} <= dev


def test_one_version() -> None:
    assert "version" not in PROJECT
    assert f"version: {trio.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "version" not in ZOO and trio_vlm_zoo.__version__ == trio.__version__
    assert PROJECT["optional-dependencies"]["zoo"] == [f"trio-vlm-zoo=={trio.__version__}"]
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(trio.__version__)} - \d{{4}}-\d\d-\d\d", sections[1])


def test_the_second_name_changes_nothing_but_names() -> None:
    """`make alias` builds that wheel and tests it beside the async library."""
    module = runpy.run_path(str(ROOT / "alias" / "build.py"))
    second = tomllib.loads(module["pyproject"]((ROOT / "pyproject.toml").read_text()))
    first = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert second["project"]["name"] == "trio-vlm-alias"
    assert second["tool"]["hatch"]["build"]["targets"]["wheel"].pop("sources") == {"trio": "trio_vlm"}
    assert set(second["project"]["scripts"].values()) == {"trio_vlm.cli:app"}
    assert second["project"]["entry-points"] == {
        "lmms_eval.models": {"trio": "trio_vlm.integrations.lmms_eval:manifest"},
        "vllm.general_plugins": {"trio": "trio_vlm.integrations.vllm:register"},
    }
    for key in ("name", "scripts", "entry-points"):
        second["project"][key] = first["project"][key]
    assert second == first
    with pytest.raises(SystemExit, match="found no"):
        module["pyproject"]("[project]")


def test_the_readme_s_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    for said in ("make demo", "make test", "pip install trio-vlm", "pip install trio-vlm-alias", "import trio_vlm"):
        assert said in first
