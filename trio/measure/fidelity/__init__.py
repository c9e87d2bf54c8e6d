"""Fidelity: how far a compressed model answers as the full one does, measured without labels.

`measure` asks a model every question with all visual tokens, with each spec, and with a random choice of as many tokens
at the same places (the floor), and compares the answers.
"""

from .measure import measure
from .report import FidelityReport, Row, SpecFidelity
from .samples import DESCRIBE, Sample, read_samples

__all__ = ["DESCRIBE", "FidelityReport", "Row", "Sample", "SpecFidelity", "measure", "read_samples"]
