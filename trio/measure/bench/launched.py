"""How many operators a prefill would launch on an accelerator, counted on a twin of the model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from ...core.upstream import Role, keywords
from ...pipeline import Pipeline
from ...spec import PipelineSpec
from ...testing.launches import META, answered, count

__all__ = ["Twin"]


class Twin:
    """A model of the same classes and configuration on the ``meta`` device, for counting (`trio.testing.launches`)."""

    def __init__(self, model: Any) -> None:
        """Builds the twin; no memory is taken."""
        with META:
            self._model: Any = type(model)(deepcopy(model.config)).to(model.dtype).eval()
        self._same = _names(self._model) == _names(model)

    def launches(self, inputs: Mapping[str, Any], spec: PipelineSpec | None) -> int | None:
        """Operators of a prefill.

        Args:
            inputs: of a forward.
            spec: what is attached; None: nothing.

        Returns:
            The number; None where the model's parameters are not those of its class (adapted or quantised ones).
        """
        if not self._same:
            return None
        host = {name: value.cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        call = partial(self._model, **keywords({Role.LOGITS_TO_KEEP: 1}))
        with torch.no_grad():
            if spec is None:
                return count(call, host).operators
            pipeline = answered(lambda: Pipeline.from_spec(spec, self._model))
            with pipeline:
                return count(call, host).operators


def _names(model: Any) -> set[str]:
    """Names of all parameters; layers may share them."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}
