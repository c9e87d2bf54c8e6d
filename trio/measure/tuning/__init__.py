"""Tuning: search for the spec that meets a target, and judge it on pictures that the search has not seen.

Needs Optuna (the extra ``tune``).
"""

from trio.measure.tuning.report import Candidate, TuningReport
from trio.measure.tuning.target import Bound, Target, parse_target
from trio.measure.tuning.tune import best_spec, tune

__all__ = ["Bound", "Candidate", "Target", "TuningReport", "best_spec", "parse_target", "tune"]
