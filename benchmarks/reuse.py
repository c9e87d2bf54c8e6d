"""What it saves that the tools encode images once for all specs: time of `trio fidelity`, with and without, in pairs.

``python -m benchmarks.reuse MODEL`` writes ``benchmarks/results/reuse-MODEL.json``; ``python -m benchmarks.measured``
puts the table into docs/fidelity.md. The counted part is the share of a run's FLOPs that stages' specs have in common
with the full model in front of their first stage, which is computed anew for each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.counting import machine
from trio import zoo
from trio.adapters import adapter_for
from trio.cost import shape_of
from trio.cost.flops import prefill_flops, projector_flops, tower_flops
from trio.measure.encoding import LIMIT
from trio.measure.fidelity import FidelityReport, PromptSample, measure
from trio.measure.shapesvqa.task import canvas_for, shapesvqa

RESULTS = Path(__file__).parent / "results"
MODELS = ("tiny-llava", "tiny-qwen2.5-vl")
#: Of each model four that fit it.
SPECS: Mapping[str, tuple[str, ...]] = {
    "tiny-llava": ("trio-soft-11", "trio-soft-22", "trio-soft-33", "trio-11"),
    "tiny-qwen2.5-vl": ("trio-soft-11", "trio-soft-22", "trio-soft-33", "trio-11"),
}
NEW_TOKENS = 2
