"""What a spec costs on a model, predicted from shapes without running anything.

`predict` gives FLOPs by part and KV-cache bytes, full beside compressed; `of_report` the same for what a run really
kept. Each part of a pipeline says what it costs (`flops`), each family what its models are (`shape_of`, which asks
`Adapter.cost_shape`). `docs/cost.md` states the formulas, and what is counted and what is not.
"""

from ..core.shape import ModelShape, TowerShape
from .flops import Attention, paper_flops
from .prediction import Cost, CostPrediction, FlopsByPart, of_report, predict
from .shape import PUBLISHED, published_shape, shape_of

__all__ = [
    "PUBLISHED",
    "Attention",
    "Cost",
    "CostPrediction",
    "FlopsByPart",
    "ModelShape",
    "TowerShape",
    "of_report",
    "paper_flops",
    "predict",
    "published_shape",
    "shape_of",
]
