"""Settings for every test: no network, and one thread."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny tensors on a shared machine: threads that wait for each other cost far more than they bring.
torch.set_num_threads(1)

# Machines differ in speed and may be shared, so no test fails for being slow once.
settings.register_profile("trio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trio")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything under tests/contract is a contract test; other files mark themselves."""
    for item in items:
        if "contract" in item.path.parts:
            item.add_marker("contract")
    if config.getoption("--third"):
        left = [item for item in items if zlib.crc32(item.nodeid.encode()) % 3]
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % 3 == 0]
        config.hook.pytest_deselected(items=left)


def pytest_report_header() -> str:
    """Which versions a run is about."""
    return f"torch {torch.__version__}, transformers {metadata.version('transformers')}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write what the contract tests found out about each family (`benchmarks.support` makes the table)."""
    parser.addoption("--third", action="store_true", help="run one test of three, always the same ones")
    parser.addoption(
        "--support-out", type=Path, help="write family x feature, as the tests found it, to this JSON file"
    )


@pytest.fixture(scope="session")
def support(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, dict[str, str]], None]]:
    """Notes what a family was found to do: `support(family, "random" or "trained", {feature: "yes" or a reason})`."""
    if request.config.getoption("--support-out") and hasattr(request.config, "workerinput"):
        raise pytest.UsageError("--support-out: processes would overwrite each other's file; add -p no:xdist or -n 0")
    found: dict[str, dict[str, dict[str, str]]] = {}

    def note(family: str, weights: str, features: dict[str, str]) -> None:
        found.setdefault(family, {}).setdefault(weights, {}).update(features)

    yield note
    out: Path | None = request.config.getoption("--support-out")
    if out is not None and found:
        data = {"transformers": metadata.version("transformers"), "torch": torch.__version__, "families": found}
        out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
