"""What a spec costs on a model, predicted from shapes without running anything.

`predict` gives FLOPs by part and KV-cache bytes, full beside compressed; `of_report` the same for what a run really
kept. `docs/cost.md` states the formulas, and what is counted and what is not.
"""

from .flops import Attention, paper_flops
from .prediction import Cost, CostPrediction, CountsFlops, FlopsByPart, of_report, predict
from .shape import ModelShape, TowerShape

__all__ = [
    "Attention",
    "Cost",
    "CostPrediction",
    "CountsFlops",
    "FlopsByPart",
    "ModelShape",
    "TowerShape",
    "of_report",
    "paper_flops",
    "predict",
]
