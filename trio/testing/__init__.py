"""The conformance suites: the promises of the runtime as functions that outsiders call on parts of their own.

`check_adapter` runs the promises on a model, `check_scorer`, `check_selector`, `check_compressor` and `check_tower`
prove a new part with one call. None needs pytest: a check that fails raises `AssertionError` with the numbers.
"""

from trio.core.prompts import InputsFactory, Prompt
from trio.testing.adapters import check_adapter
from trio.testing.compressors import check_compressor
from trio.testing.inputs import ProcessorInputs
from trio.testing.promises import PROMISES
from trio.testing.results import Check, Results
from trio.testing.scorers import check_scorer
from trio.testing.selectors import check_selector
from trio.testing.tiny import TokenInputs, tiny_llava
from trio.testing.towers import check_tower

__all__ = [
    "PROMISES",
    "Check",
    "InputsFactory",
    "ProcessorInputs",
    "Prompt",
    "Results",
    "TokenInputs",
    "check_adapter",
    "check_compressor",
    "check_scorer",
    "check_selector",
    "check_tower",
    "tiny_llava",
]
