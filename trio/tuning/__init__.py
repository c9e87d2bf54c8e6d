"""Tuning: search for the spec that meets a target, and judge it on pictures that the search has not seen.

Needs Optuna (the extra ``tune``).
"""

from trio.tuning.report import Candidate, TuningReport
from trio.tuning.target import Bound, Target, parse_target
from trio.tuning.tune import best_spec, tune

__all__ = ["Bound", "Candidate", "Target", "TuningReport", "best_spec", "parse_target", "tune"]
