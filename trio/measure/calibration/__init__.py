"""Calibration: when a model takes an image in, and a schedule of stages that fits, judged on unseen images.

`drop_all_curve` measures the first, `calibrate` does all of it. Neither needs labels.
"""

from .calibrate import calibrate
from .curve import QUESTIONS, drop_all_curve
from .placement import Placement, absorption
from .report import CalibrationReport, CalibrationRow, CurvePoint, DropAllCurve, UnseenComparison

__all__ = [
    "QUESTIONS",
    "CalibrationReport",
    "CalibrationRow",
    "CurvePoint",
    "DropAllCurve",
    "Placement",
    "UnseenComparison",
    "absorption",
    "calibrate",
    "drop_all_curve",
]
