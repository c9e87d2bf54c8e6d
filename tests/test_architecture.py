"""Who may import whom: each folder only what stands before it, also where the import is inside a function."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import trio

ROOT = Path(trio.__file__).parent
#: From the bottom to the top; folders of one line do not import each other. docs/architecture.md has the same table.
LAYERS = [
    ["errors"],
    ["core"],
    ["registry"],
    ["spec"],
    ["scorers", "selectors"],
    ["encoders"],
    ["runtime"],
    ["adapters"],
    ["report"],
    ["cost"],
    ["pipeline"],
    ["testing"],
    ["zoo"],
    ["measure"],
    ["batch"],
    ["integrations"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def place(file: Path) -> str:
    """The folder (or module at the door) that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Folders of the package that a source imports; `package`: where the source lies, as ("trio", "spec")."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "trio" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_before_its_folder(file):
    own = place(file)
    package = ("trio", *file.relative_to(ROOT).parts[:-1])
    others = {name for name in imports(file.read_text(encoding="utf-8"), package) if name in LEVEL and name != own}
    wrong = sorted(name for name in others if LEVEL[name] >= LEVEL[own])
    assert not wrong, f"{own} imports {', '.join(wrong)}"


def test_every_folder_has_its_place():
    assert {place(file) for file in FILES} <= LEVEL.keys()


def test_the_test_sees_every_form():
    lines = ["import trio.cli", "def f():", "    from ..measure import x", "from trio import zoo", "from .a import b"]
    source = "\n".join(lines)
    assert imports(source, ("trio", "spec")) == {"cli", "measure", "zoo", "spec"}


def test_the_page_has_the_same_table():
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(LAYERS) + 1))
    assert [re.findall(r"`(\w+)`", names) for _, names in rows] == LAYERS
