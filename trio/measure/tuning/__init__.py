"""Tuning: search for the spec that meets a target, and judge it on images that the search has not seen.

Needs Optuna (the extra ``tune``).
"""

from .report import Candidate, TuningReport
from .target import Bound, Target, parse_target
from .tune import best_spec, tune

__all__ = ["Bound", "Candidate", "Target", "TuningReport", "best_spec", "parse_target", "tune"]
