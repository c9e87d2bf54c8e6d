"""Settings for every test: no network, and no more threads than a small machine has cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(2)

# Machines differ in speed and may be shared, so no test fails for being slow once.
settings.register_profile("trio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trio")
