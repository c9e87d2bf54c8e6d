"""Build the package under the import name `trio_vlm`: ``python alias/build.py FOLDER`` writes a wheel into FOLDER.

The sources and the configuration are those of the checkout. The wheel differs in its name, in its entry points and in
one line of build configuration, which says what the folder `trio` is called where it is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "trio-vlm-alias"
#: Texts of pyproject.toml and what stands there instead. Each occurs, so that a change there is met here.
CHANGES = {
    'name = "trio-vlm"': f'name = "{DISTRIBUTION}"',
    'packages = ["trio"]': 'packages = ["trio"]\nsources = { "trio" = "trio_vlm" }',
    '= "trio.': '= "trio_vlm.',
}


def pyproject(text: str) -> str:
    """The build configuration of the second wheel, from that of the first."""
    for old, new in CHANGES.items():
        if old not in text:
            raise SystemExit(f"pyproject.toml: found no {old!r}, which the second wheel changes; update {__file__}.")
        text = text.replace(old, new)
    return text


def build(out: Path) -> None:
    """Write the wheel into a folder."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(ROOT / "trio", folder / "trio", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (folder / "pyproject.toml").write_text(pyproject(text), encoding="utf-8")
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out.resolve())]
        subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
