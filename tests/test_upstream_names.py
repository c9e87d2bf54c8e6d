"""Only one module spells what transformers renames."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trio
from trio.core.upstream import NAMES, Role

ROOT = Path(trio.__file__).parent
#: Names of caches, masks, positions, layer calls and ways of generating, and of the classes and modules behind them.
SPELT = {
    *(
        name
        for role in (
            Role.CACHE,
            Role.USE_CACHE,
            Role.MASK,
            Role.POSITIONS,
            Role.ROTARY,
            Role.HIDDEN,
            Role.ENCODED,
            Role.EMBEDDINGS,
            Role.LOGITS_TO_KEEP,
        )
        for name in NAMES[role]
        if name != "cache"  # a word of its own
    ),
    "cache_params",
    "cache_position",
    "cache_utils",
    "masking_utils",
    "create_causal_mask",
    "sliding_window_overlay",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "StaticCache",
    "last_hidden_state",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
    "cache_implementation",
}
#: What is run once to train a model that is then shipped; the results are tested, on every release.
TRAINING = {"trio/zoo/" + name for name in ("language.py", "packing.py", "tower.py")}
#: The judge shares nothing with what it judges; the stand-in for flash-attention has the signature that it stands for.
JUDGES = {"trio/testing/" + name for name in ("oracle.py", "stock.py", "varlen.py", "promises/oracle.py")}
EXEMPT = {"trio/core/upstream.py", *TRAINING, *JUDGES}


def names_in(source: str) -> set[tuple[str, int]]:
    """Identifiers, attributes, keywords, imports and whole strings of a source, with their lines."""
    tree = ast.parse(source)
    texts = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and ast.get_docstring(node)
    }
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add((node.id, node.lineno))
        elif isinstance(node, ast.Attribute):
            found.add((node.attr, node.lineno))
        elif isinstance(node, ast.arg):
            found.add((node.arg, node.lineno))
        elif isinstance(node, ast.keyword) and node.arg:
            found.add((node.arg, node.value.lineno))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [*module.split("."), *(part for alias in node.names for part in alias.name.split("."))]
            found |= {(name, node.lineno) for name in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            found.add((node.value, node.lineno))
    return found


FILES = sorted(f"trio/{file.relative_to(ROOT)}" for file in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", [f for f in FILES if f not in EXEMPT])
def test_no_other_module_spells_a_name_that_transformers_may_change(file):
    from_upstream = {"Cache", "DynamicCache", "DynamicLayer", "StaticCache"}
    source = (ROOT.parent / file).read_text(encoding="utf-8")
    taken = from_upstream if "upstream import" in source or "import upstream" in source else set()
    spelt = SPELT - taken
    found = sorted(f"{file}:{line}: {name}" for name, line in names_in(source) if name in spelt)
    assert not found, "\n".join(found)


def test_the_test_sees_what_it_looks_for():
    source = 'from transformers.cache_utils import X\nf(past_key_values=1)\na.use_cache\nd["attention_mask"]\n'
    assert {"cache_utils", "past_key_values", "use_cache", "attention_mask"} <= {name for name, _ in names_in(source)}
    assert names_in('"""attention_mask"""\n') == set()
    upstream = names_in((ROOT / "core" / "upstream.py").read_text(encoding="utf-8"))
    assert {"past_key_values", "create_causal_mask"} <= {name for name, _ in upstream}
