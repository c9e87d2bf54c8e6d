"""The conformance suites: the promises of the runtime as functions that outsiders call on parts of their own.

`check_adapter` runs the promises on a model, `check_scorer`, `check_selector`, `check_compressor` and `check_tower`
prove a new part with one call. None needs pytest: a check that fails raises `AssertionError` with the numbers.
"""

from ..core.prompts import InputsFactory, Prompt
from .adapters import check_adapter
from .compressors import check_compressor
from .inputs import ProcessorInputs
from .promises import PROMISES
from .results import Check, CheckResults
from .scorers import check_scorer
from .selectors import check_selector
from .tiny import TokenInputs, tiny_llava
from .towers import check_tower

__all__ = [
    "PROMISES",
    "Check",
    "CheckResults",
    "InputsFactory",
    "ProcessorInputs",
    "Prompt",
    "TokenInputs",
    "check_adapter",
    "check_compressor",
    "check_scorer",
    "check_selector",
    "check_tower",
    "tiny_llava",
]
