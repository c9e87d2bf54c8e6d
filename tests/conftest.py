"""Settings for every test: no network, and no more threads than a small machine has cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(2)
