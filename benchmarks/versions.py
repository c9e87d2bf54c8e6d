"""Which promises hold on which release of transformers, on a tiny random model of every family that has one.

``make versions`` runs ``python -m benchmarks.versions`` in an environment for each minor release, which writes
benchmarks/results/versions-VERSION.json; ``python -m benchmarks.support`` makes the table in docs/support.md from these
files. ``python -m benchmarks.versions --list`` prints the minor releases that pip gives, oldest first.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOWEST = (5, 17)


def minors() -> list[str]:
    """The minor releases from the lowest supported one to the newest that pip gives, as 5.x, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = {(int(major), int(minor)) for major, minor in re.findall(r"\b(\d+)\.(\d+)\.\d+\b", told)}
    return [f"{major}.{minor}" for major, minor in sorted(pairs) if (major, minor) >= LOWEST and major == LOWEST[0]]


def families() -> list[str]:
    """The model types that have a tiny model, through their adapters."""
    from trio.adapters.find import tiny_families

    return sorted(tiny_families())


def measure() -> dict[str, Any]:
    """Checks by family and promise: how many hold, of how many, and what those that do not say."""
    import torch
    import transformers

    from trio.adapters import adapter_for
    from trio.adapters.find import tiny_families
    from trio.core.upstream import default_model, silenced
    from trio.errors import UnsupportedModelError
    from trio.runtime.canary import tiny_of
    from trio.testing import PROMISES, check_adapter

    torch.set_num_threads(1)
    measured: dict[str, Any] = {}
    begin, makers = time.monotonic(), tiny_families()
    for name in families():
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")
            try:
                cls, config = default_model(name)
            except UnsupportedModelError:
                measured[name] = None  # the release does not have it
                continue
            tiny = tiny_of(adapter_for(cls(makers[name].tiny_config(config)).eval()))
            model: Any = tiny.backbone.model
            model.generation_config.suppress_tokens = list(tiny.unwritten)
            found = check_adapter(model, tiny.inputs, raise_on_failure=False)
        by_promise = {promise: [c for c in found if c.promise == promise] for promise in PROMISES}
        measured[name] = {
            "checks": {promise: [sum(c.passed for c in checks), len(checks)] for promise, checks in by_promise.items()},
            "broken": [str(check) for check in found.failures],
        }
        sys.stderr.write(f"{name}: {len(found) - len(found.failures)} of {len(found)}\n")
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "families": measured,
    }


def load() -> list[dict[str, Any]]:
    """What was measured, oldest release first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("versions-*.json")]
    return sorted(found, key=lambda data: [int(part) for part in re.findall(r"\d+", data["transformers"])])


def table(found: list[dict[str, Any]]) -> str:
    """Promises kept by release, in Markdown: checks that hold of those that were made, over all families."""
    promises = list(dict.fromkeys(p for data in found for f in data["families"].values() if f for p in f["checks"]))
    lines = [
        "| transformers | families | " + " | ".join(promises) + " |",
        "| --- | ---: |" + " ---: |" * len(promises),
    ]
    for data in reversed(found):
        families = [family for family in data["families"].values() if family]
        cells = []
        for promise in promises:
            pairs = [family["checks"][promise] for family in families if promise in family["checks"]]
            held, made = (sum(pair[n] for pair in pairs) for n in (0, 1))
            cells.append(str(held) if held == made else f"**{held} of {made}**")
        lines.append(f"| {data['transformers']} | {len(families)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def broken(found: list[dict[str, Any]]) -> list[str]:
    """A line for each family and release with checks that do not hold: how many, and the first."""
    return [
        f"- transformers {data['transformers']}, `{name}`: {len(family['broken'])}; {family['broken'][0]}"
        for data in reversed(found)
        for name, family in data["families"].items()
        if family and family["broken"]
    ]


def main() -> None:
    """Measures the installed release, or lists the minor ones."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--list", action="store_true", help="print the minor releases that pip gives, and stop")
    if arguments.parse_args().list:
        sys.stdout.write(" ".join(minors()) + "\n")
        return
    data = measure()
    minor = ".".join(data["transformers"].split(".")[:2])
    (RESULTS / f"versions-{minor}.json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
