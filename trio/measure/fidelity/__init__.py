"""Fidelity: how far a compressed model answers as the full one does, measured without labels.

`measure` asks a model every question with all visual tokens, with each spec, and with a random choice of as many tokens
at the same places (the floor), and compares the answers.
"""

from .measure import measure
from .report import FidelityReport, FidelityRow, SpecFidelity
from .samples import DESCRIBE, PromptSample, read_samples

__all__ = ["DESCRIBE", "FidelityReport", "FidelityRow", "PromptSample", "SpecFidelity", "measure", "read_samples"]
