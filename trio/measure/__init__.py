"""Measuring: fidelity, evaluation, tuning, and the data set ShapesVQA. Needs a pipeline; no pipeline needs it."""
