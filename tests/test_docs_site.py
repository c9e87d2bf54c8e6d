"""What the site needs of the pages: `make docs` builds it strictly, but not in every run of the tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import trio
from trio.encoders.compressors.base import COMPRESSORS
from trio.registry import Registry
from trio.scorers.base import SCORERS
from trio.selectors.base import SELECTORS
from trio.spec import load_spec, shipped_specs
from trio.spec.schedule import resolve

DOCS = Path(trio.__file__).parent.parent / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))


def described(page: str) -> list[str]:
    """What a page of the reference takes from docstrings."""
    return re.findall(r"^::: (\S+)$", (DOCS / "reference" / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_public_name_is_in_the_reference_once() -> None:
    names = [name for page in ("api.md", "modules.md") for name in described(page)]
    assert sorted(names) == sorted([f"trio.{name}" for name in trio.__all__] + ["trio.registry.Registry"])


@pytest.mark.parametrize("registry", [SCORERS, SELECTORS, COMPRESSORS], ids=lambda one: one.kind)
def test_every_built_in_part_is_in_the_reference(registry: Registry[Any]) -> None:
    page = (DOCS / "reference" / "parts.md").read_text(encoding="utf-8")
    _, _, section = page.partition(f"## {registry.kind.capitalize()}s\n")
    section, *_ = re.split(r"^## ", section, flags=re.MULTILINE)
    shown = dict(re.findall(r"^### `(\S+)`\n\n::: (\S+)$", section, re.MULTILINE))
    classes = {name: registry.get(name) for name in registry.names()}
    assert shown == {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in classes.items()}
    assert all(cls.__doc__ for cls in classes.values())


def pages(nav: Any) -> list[str]:
    """The files of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in pages(one)]


def test_every_page_has_its_place_in_the_navigation() -> None:
    there = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    listed = pages(CONFIG["nav"])
    assert len(listed) == len(set(listed)) and set(listed) == there


def test_every_page_is_on_the_front_page() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert linked == {page for page in pages(CONFIG["nav"]) if "/" not in page or page.startswith("reference/")} - {
        "README.md"
    }


def test_the_site_is_strict_and_loads_no_fonts_of_others() -> None:
    assert CONFIG["strict"] is True and CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG and "extra_css" not in CONFIG


def test_the_table_of_specs_has_each_one_with_its_average() -> None:
    text = (DOCS / "choose-a-spec.md").read_text(encoding="utf-8").partition("## All that are shipped")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    shown = {}
    for names, _, average in rows:
        specs = re.findall(r"`([^`]+)`", names)
        numbers = re.findall(r"[\d.]+", average.partition(" of ")[0])
        shares = average.endswith("%")
        shown |= {spec: (number, shares) for spec, number in zip(specs, numbers, strict=True)}
    assert sorted(shown) == shipped_specs()
    for name, (number, share) in shown.items():
        total, layers = (2880, 32) if "next" in name else (1296, 28) if "qwen" in name else (576, 32)
        average = resolve(load_spec(name), layers).average(total)
        kept = 100 * average / total if share else average
        assert kept == pytest.approx(float(number), rel=0.01), name


def test_contributing_names_the_check_of_every_kind_of_part() -> None:
    text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"trio\.testing\.(check_\w+)", text)) == {
        name for name in trio.testing.__all__ if name.startswith("check_")
    }
    for folder in re.findall(r"\| `(trio/\S+/)` \|", text):
        assert (DOCS.parent / folder / "base.py").is_file(), folder
    targets = re.findall(r"^\$ make (\S+)", text, re.MULTILINE)
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    assert len(targets) >= 4 and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    modules = re.findall(r"python -m benchmarks\.(\w+)", text)
    assert len(modules) >= 6 and all((DOCS.parent / "benchmarks" / f"{name}.py").is_file() for name in modules)


def test_the_urls_are_of_one_repository() -> None:
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {url.startswith(CONFIG["repo_url"]) for url in project["urls"].values()} == {True}
