"""Settings for every test: no network, and one thread."""

from __future__ import annotations

import os
from importlib import metadata

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny tensors on a shared machine: threads that wait for each other cost far more than they bring.
torch.set_num_threads(1)

# Machines differ in speed and may be shared, so no test fails for being slow once.
settings.register_profile("trio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trio")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/contract is a contract test; other files mark themselves."""
    for item in items:
        if "contract" in item.path.parts:
            item.add_marker("contract")


def pytest_report_header() -> str:
    """Which versions a run is about."""
    return f"torch {torch.__version__}, transformers {metadata.version('transformers')}"
