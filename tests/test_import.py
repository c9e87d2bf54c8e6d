"""`import trio` is instant, imports nothing heavy, and lives beside libraries that look for the async `trio`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trio

pytestmark = pytest.mark.contract

ROOT = Path(trio.__file__).parent.parent


def python(code: str, *, path: Path | None = None) -> str:
    """Standard output of a fresh interpreter that sees the package (and `path`)."""
    paths = [str(one) for one in (path, ROOT) if one is not None]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def async_library(folder: Path, version: str = "0.31.0") -> Path:
    """A folder that, on the path, looks as if the async library's distribution were installed."""
    info = folder / f"trio-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trio\nVersion: {version}\n")
    return folder


def test_import_loads_only_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
import trio
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"trio"}
import json
print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""
    assert json.loads(python(code)) == []


@pytest.mark.parametrize(
    "light",
    [
        "import trio.errors; trio.TrioError",
        "import trio.registry; trio.registry.Registry",
        "import trio.zoo; trio.zoo.path('tiny-llava'), trio.zoo.demo_question()",
        "import trio.cli",  # `trio --help` answers at once
        "import trio.core.images, trio.core.files, trio.core.printable",
    ],
)
def test_import_light_modules(light: str) -> None:
    """What works without a part or a spec; registries stand beside the base classes of their parts and load those."""
    code = f"""
import sys
{light}
print([name for name in ("torch", "transformers", "pydantic") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_specs_are_read_and_registries_found_without_transformers() -> None:
    code = """
import sys, trio
trio.PipelineSpec, trio.SCORERS, trio.SELECTORS
print("transformers" in sys.modules)
"""
    assert python(code).strip() == "False"


def test_imports_inside_the_package_are_relative() -> None:
    """So that the same sources work under another import name."""
    wrong = []
    for file in Path(trio.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{file}:{node.lineno}" for name in names if name.partition(".")[0] == "trio"]
    assert not wrong


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import trio; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_transformers_imports_beside_it() -> None:
    """Even after `import trio`, with the project first on the path and the conflict's metadata absent."""
    code = """
import warnings
warnings.simplefilter("error", RuntimeWarning)
import trio, transformers
from transformers import AutoProcessor
print(transformers.__version__)
"""
    assert python(code).strip().startswith("5.")


def test_anyio_without_the_async_library() -> None:
    """The client's own answer to a missing backend, not a strange failure."""
    code = """
import trio, anyio
async def main(): return 1
print(anyio.run(main))
try:
    anyio.run(main, backend="trio")
except LookupError as error:
    print(error)
"""
    first, second = python(code).splitlines()
    assert first == "1"
    assert "'trio' is not available" in second or "No such backend" in second


def test_public_names_resolve() -> None:
    missing = [name for name in trio.__all__ if getattr(trio, name, None) is None]
    assert missing == []
    assert trio.Stage is trio.StageSpec
    assert set(trio.__all__) <= set(dir(trio))


@pytest.mark.parametrize("name", ["sleep", "open_nursery", "Lock"])
def test_names_of_the_async_library_are_explained(name: str) -> None:
    with pytest.raises(AttributeError, match="not the async library 'trio'"):
        getattr(trio, name)


def test_from_import_of_an_unknown_name_is_an_import_error() -> None:
    code = """
try:
    from trio import open_nursery
except ImportError as error:
    print("ImportError", error)
"""
    assert python(code).startswith("ImportError")


def test_typos_are_suggested() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'Pipeline'"):
        trio.Pipelin  # noqa: B018


def test_both_installed_is_said(tmp_path: Path) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trio
    assert not caught
    trio.TrioError
    trio.SpecError
print([str(one.message) for one in caught])
try:
    trio.run
except AttributeError as error:
    print(error)
"""
    warned, explained = python(code, path=async_library(tmp_path)).splitlines()
    assert warned.count("0.31.0") == 1
    assert "Make a fresh environment" in warned and "trio-vlm-alias" in warned
    assert "version 0.31.0" in explained


def test_every_error_is_a_trio_error() -> None:
    from trio import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), trio.TrioError)
    assert issubclass(trio.UnknownNameError, LookupError)
    assert issubclass(trio.InputError, ValueError)


def test_version_is_the_distribution_s() -> None:
    from importlib import metadata

    try:
        installed = metadata.version("trio-vlm")
    except metadata.PackageNotFoundError:  # run from a source tree
        installed = trio.__version__
    assert installed == trio.__version__
    assert trio.__version__.count(".") == 2
