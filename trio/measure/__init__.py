"""Measuring: fidelity, evaluation, tuning, calibration, the data set ShapesVQA. It needs a pipeline; none needs it."""
