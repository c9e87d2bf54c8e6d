"""Settings for every test: no network, and one thread."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

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


Found = dict[str, dict[str, dict[str, str]]]
FOUND = pytest.StashKey[Found]()


def pytest_configure(config: pytest.Config) -> None:
    """What is found is kept with the configuration: of a worker, or of the one process."""
    config.stash[FOUND] = {}


@pytest.fixture(scope="session")
def support(request: pytest.FixtureRequest) -> Callable[[str, str, dict[str, str]], None]:
    """Notes what a family was found to do: `support(family, "random" or "trained", {feature: "yes" or a reason})`."""
    found = request.config.stash[FOUND]

    def note(family: str, weights: str, features: dict[str, str]) -> None:
        found.setdefault(family, {}).setdefault(weights, {}).update(features)

    return note


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of xdist has ended: its findings join the others."""
    found = node.config.stash[FOUND]
    for family, by_weights in getattr(node, "workeroutput", {}).get("support", {}).items():
        for weights, features in by_weights.items():
            found.setdefault(family, {}).setdefault(weights, {}).update(features)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its findings on; the process that began the run writes them."""
    config = session.config
    out: Path | None = config.getoption("--support-out")
    if hasattr(config, "workeroutput"):
        config.workeroutput["support"] = config.stash[FOUND]
    elif out is not None and config.stash[FOUND]:
        data = {
            "transformers": metadata.version("transformers"),
            "torch": torch.__version__,
            "families": config.stash[FOUND],
        }
        out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
