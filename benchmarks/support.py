"""The table of what each family of models was found to do, from what the tests ran.

``python -m pytest -m contract --support-out benchmarks/results/support-VERSION.json`` writes what the tests found;
``python -m benchmarks.support`` makes docs/support.md and the table in the README from the committed files. Nothing is
filled in by hand: what no test ran is left blank.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import quantised, versions
from benchmarks.tables import write_block
from trio.adapters.base import ADAPTERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- support table: python -m benchmarks.support -->", "<!-- end of the support table -->"
FEATURES = [
    "stages",
    "compressor",
    "batch",
    "several images",
    "video",
    "beams",
    "no cache",
    "second turn",
    "new image in a later turn",
    "eager",
    "sdpa",
    "flex_attention",
    "flash convention",
]
#: Models without an adapter of their own, by the tests' names for them; the others are called as their adapters say.
OTHERS = {
    "llava-seed1": "LLaVA-1.5, another seed",
    "llava-early": "LLaVA-1.5, image taken in early",
    "llava-late": "LLaVA-1.5, image taken in late",
    "smolvlm": "SmolVLM (generic)",
    "mistral3": "Mistral3 (generic)",
    "glm4v": "GLM-4V (generic)",
    "vipllava": "ViP-LLaVA (generic)",
    "deepseek-vl": "DeepSeek-VL (generic)",
    "janus": "Janus (generic)",
}
WEIGHTS = {"random": "r", "trained": "t", "real": "R"}
MARKS = {"yes": "", "stock": "*", "by hand": "†"}
LEGEND = """\
**r**: a tiny model with random weights. **t**: the zoo's small trained model. **R**: a real checkpoint (none was run
yet). Blank: no test ran it. \\*: the stock model itself cannot do (all of) this with that version of transformers, so
that there is nothing to promise. †: by forwards with position ids of one's own; the stock `generate` cannot. "flash
convention" is the calling convention of flash-attention with a stand-in that refuses 4-D masks; flash-attention itself
was not run."""


CHECKS = RESULTS / "checks.json"


def checks_cost(data: dict[str, Any]) -> str:
    """What the checks cost that watch the runtime while it answers."""
    parts = [
        f"a {what} ({data['milliseconds'][what]} ms) takes {middle:.3f} times as long ({low:.3f} to {high:.3f})"
        for what, (low, middle, high) in data["ratio"].items()
    ]
    return (
        f"With the checks that watch caches, masks and calls while the runtime answers, {' and '.join(parts)}. Median "
        f"and quartiles of {data['rounds']} pairs in one run of `{data['command']}`, on {data['model']} (steps so "
        f"short that every line of Python shows), spec `{data['spec']}`, {data['machine']}, transformers "
        f"{data['transformers']}."
    )


def labels() -> dict[str, str]:
    """What the table calls each family, by the tests' names: those of adapters, by label, then the others."""
    own = {key: label for name in ADAPTERS.names() for key, label in ADAPTERS.get(name).labels.items()}
    return {**dict(sorted(own.items(), key=lambda item: item[1])), **OTHERS}


def load() -> list[dict[str, Any]]:
    """What the tests found, oldest transformers first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("support-*.json")]
    return sorted(found, key=lambda data: [int(part) for part in re.findall(r"\d+", data["transformers"])])


def table(data: dict[str, Any]) -> str:
    """One version's table in Markdown: a row a family, a column a feature."""
    lines = ["| family | " + " | ".join(FEATURES) + " |", "| --- |" + " :-: |" * len(FEATURES)]
    families, names = data["families"], labels()
    for key in [*names, *sorted(families.keys() - names.keys())]:
        if key not in families:
            continue
        cells = []
        for feature in FEATURES:
            marks = [
                letter + MARKS[families[key][weights][feature]]
                for weights, letter in WEIGHTS.items()
                if feature in families[key].get(weights, {})
            ]
            cells.append(" ".join(marks))
        lines.append(f"| {names.get(key, key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Writes docs/support.md and the README's table."""
    found = load()
    parts = ["# What was tested on which models", LEGEND]
    for data in reversed(found):
        parts += [f"## transformers {data['transformers']} (torch {data['torch']})", table(data)]
    releases = versions.load()
    if releases:
        parts += [
            "## Promises kept, by release of transformers",
            "How many checks of each promise hold, over tiny random models of the families that a release has. Bold: "
            "some do not. Earlier versions of this package gave wrong answers on 5.24 without an error (CHANGELOG.md).",
            versions.table(releases),
        ]
        if CHECKS.exists():
            parts += [checks_cost(json.loads(CHECKS.read_text()))]
        lines = versions.broken(releases)
        parts += ["Not kept:", "\n".join(lines)] if lines else []
    if quantised.RESULT.exists():
        parts.append(quantised.page(json.loads(quantised.RESULT.read_text())))
    parts.append(
        "Made by `python -m benchmarks.support` from `benchmarks/results/support-*.json`, which the tests wrote, "
        "`benchmarks/results/versions-*.json`, which `make versions` wrote, and `benchmarks/results/quantised.json`."
    )
    (ROOT / "docs" / "support.md").write_text("\n\n".join(parts) + "\n")
    newest = found[-1]
    block = "\n\n".join([BEGIN, f"With transformers {newest['transformers']}:", table(newest), LEGEND, END])
    write_block(ROOT / "README.md", block)


if __name__ == "__main__":
    main()
