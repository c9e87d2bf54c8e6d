"""Measuring: fidelity, evaluation, tuning, calibration, and the data set ShapesVQA. Needs a pipeline; no pipeline needs it."""
