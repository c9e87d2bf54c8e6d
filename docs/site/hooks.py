"""What the build of the site checks and changes beyond what `mkdocs build --strict` does.

Links out of the documentation (``../examples/...``) become links into the repository; every public name of the package
has an entry in the reference; no page loads anything from another host.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
REFERENCE = "reference/"
_OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)((?:#[^)\s]*)?)\)")
_LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
_anchors: set[str] = set()


def public_names() -> list[str]:
    """``trio.__all__``, read without importing anything."""
    tree = ast.parse((ROOT / "trio" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(one, "id", "") for one in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    raise PluginError("trio/__init__.py has no __all__: put the public names there as a plain list")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links to files of the repository that are not part of the site lead to the repository's page."""
    source = Path(config.docs_dir) / page.file.src_uri

    def into_repository(link: re.Match[str]) -> str:
        target = (source.parent / (link[1] + link[2])).resolve()
        if target.is_relative_to(Path(config.docs_dir).resolve()):
            return link[0]
        if not target.is_relative_to(ROOT) or not target.exists():
            raise PluginError(f"{page.file.src_uri}: the link to {link[1]}{link[2]} leads nowhere; correct the path")
        return f"]({config.repo_url.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}{link[3]})"

    return _OUTSIDE.sub(into_repository, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Notes what the reference describes."""
    if page.file.src_uri.startswith(REFERENCE):
        _anchors.update(re.findall(r'id="(trio[\w.]*)"', html))
    return html


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuses pages that load something from another host."""
    found = _LOADED.findall(output)
    if found:
        raise PluginError(
            f"{page.file.src_uri} loads from other hosts: {', '.join(found)}; the site has to work offline"
        )
    return output


def on_post_build(**_: Any) -> None:
    """Refuses a reference that leaves a public name out."""
    missing = [name for name in public_names() if f"trio.{name}" not in _anchors]
    if missing:
        raise PluginError(
            f"the reference lacks {', '.join(missing)}: add `::: trio.NAME` to docs/reference/api.md or modules.md"
        )
