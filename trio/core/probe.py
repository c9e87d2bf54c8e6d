"""The view into one decoder layer that scorers get: chosen rows and gradients, without running the layer whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

#: What gives the logits of a proxy loss: the model's output head, or its input embedding used as one.
Head = Literal["output", "input-embedding"]


@dataclass(frozen=True)
class Rows:
    """Chosen rows of the sequence, a fixed number for each sample.

    Attributes:
        index: int64 ``(B, R)``, columns of the sequence; an entry that is not valid still points at a valid column.
        valid: bool ``(B, R)``; False where a sample is too short to have that row.
        span: the same columns as a slice, where the host knows that they are these in every sample, and all valid.
    """

    index: torch.Tensor
    valid: torch.Tensor
    span: slice | None = None


@dataclass(frozen=True)
class Past:
    """Keys and values that earlier turns left in the layer's cache.

    Attributes:
        keys: ``(B, key-value heads, P, head dim)``, already rotated.
        values: the same shape.
        valid: bool ``(B, P)``, False at padding.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What enters a decoder layer in the running forward.

    Attributes:
        hidden: ``(B, S, D)`` hidden states.
        valid: bool ``(B, S)``, False at padding.
        rotary: what the model's rotary module gave for these positions.
        past: what the layer's cache holds from earlier turns, None at a first turn.
        others: further arguments of the layer for these tokens, by name; empty in most families.
        padded: whether some column may be padding; False where the host knows that none is.
    """

    hidden: torch.Tensor
    valid: torch.Tensor
    rotary: Any
    past: Past | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = True


def rows_at_end(valid: torch.Tensor, count: int, *, skip: int = 0) -> Rows:
    """The last `count` valid rows of each sample, after leaving out the `skip` last ones.

    Args:
        valid: bool ``(B, S)``; the end of a sample is its own last valid column, whatever the padding side.
        count: rows for each sample, at least 1.
        skip: how many of the last rows to leave out.

    Returns:
        Rows in rising order. Rows that a short sample lacks are not valid.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, -1).topk(min(count + skip, valid.shape[1])).values  # falling
    if last.shape[1] < count + skip:
        last = torch.nn.functional.pad(last, (0, count + skip - last.shape[1]), value=-1)
    index = last[:, skip:].flip(1)
    exists = index >= 0
    return Rows(torch.where(exists, index, last[:, :1].clamp_min(0)), exists)


def rows_of_span(valid: torch.Tensor, span: slice) -> Rows:
    """The rows of some columns, of which the host knows that they are valid in every sample.

    Args:
        valid: bool ``(B, S)``.
        span: its columns, with a start and a stop.
    """
    index = torch.arange(span.start, span.stop, device=valid.device)
    return Rows(index.expand(valid.shape[0], -1), valid[:, span], span)


class Probe(ABC):
    """A decoder layer, the final norm and the output head, bound to the inputs of the running forward."""

    #: "rows" where only the chosen rows are computed, "layer" where the whole layer runs.
    how: str

    def __init__(self, inputs: LayerInputs, logits: Callable[..., torch.Tensor]) -> None:
        """Binds a probe.

        Args:
            inputs: what enters the layer.
            logits: the model's final norm and output head, ``(B, R, D) -> (B, R, vocabulary)``; with ``head`` as
                `Head` has it.
        """
        self.inputs = inputs
        self._logits = logits

    @abstractmethod
    def attention_rows(self, rows: Rows) -> torch.Tensor:
        """Attention probabilities of the chosen rows, float32 ``(B, heads, R, S)``, for the columns of this forward."""

    @abstractmethod
    def _forward_rows(self, inputs: LayerInputs, rows: Rows) -> torch.Tensor:
        """The layer's output at the chosen rows, ``(B, R, D)``, differentiable in `inputs.hidden`."""

    def output_rows(self, rows: Rows) -> torch.Tensor:
        """The hidden states that leave the layer at the chosen rows, ``(B, R, D)``."""
        with torch.no_grad():
            return self._forward_rows(self.inputs, rows)

    def saliency(self, rows: Rows, *, head: Head = "output") -> torch.Tensor:
        """L2 norm of the gradient of the layer-local proxy loss by every hidden state that enters the layer.

        The layer's output at the rows goes through the final norm and the output head; the loss of a sample is the
        mean cross-entropy of those logits against their own argmax (TRIO, arXiv 2602.04657, its layer-local proxy
        loss). The gradient by the logits, softmax minus one-hot, is written down directly and scaled by a power of
        two for each sample, so that nothing underflows in float16; the scale is taken out of the result.

        Args:
            rows: the supervised rows.
            head: what gives the logits.

        Returns:
            float32 ``(B, S)``, at least 0. A sample without a valid row is all zero.
        """
        with _differentiable():
            inputs = _detached(self.inputs)
            rows = Rows(_plain(rows.index), _plain(rows.valid), rows.span)
            hidden = inputs.hidden.requires_grad_(True)
            logits = self._logits(self._forward_rows(inputs, rows), head=head)
            valid = None if rows.span is not None else rows.valid.to(logits.device)
            weight, scale = _loss_gradient(logits.detach(), valid)
            (gradient,) = torch.autograd.grad(logits, hidden, grad_outputs=weight.to(logits.dtype))
            norms: torch.Tensor = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
            return norms / scale[:, None].to(norms.device)


def _loss_gradient(logits: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the mean cross-entropy against the own argmax, and the power of two it was multiplied by.

    Args:
        logits: ``(B, R, V)``.
        valid: bool ``(B, R)``; None: all rows are.

    Returns:
        The scaled gradient, float32 ``(B, R, V)``, its largest entry from 1 to below 2, and the scale ``(B,)``.
    """
    label = logits.argmax(-1, keepdim=True)
    others = logits.softmax(-1, dtype=torch.float32).scatter(-1, label, 0.0)
    # Minus the sum of the others rather than p - 1: exact also where the model is so sure that p rounds to 1.
    missing = others.sum(-1, keepdim=True)
    share: torch.Tensor | float = 1 / logits.shape[1]
    if valid is not None:
        share = (valid / valid.sum(1, keepdim=True, dtype=torch.float32).clamp_min(1))[..., None]
    # No entry of a row is larger than that of its label.
    largest = (missing * share).amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    # The exponent's bits alone are the power of two just below. `frexp` is not there on every device.
    scale = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).reciprocal()
    return others.scatter(-1, label, -missing) * (scale[:, None, None] * share), scale


@contextmanager
def _differentiable() -> Iterator[None]:
    """Autograd on, also inside `torch.no_grad` (what generate uses) and `torch.inference_mode` (what users add)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _detached(inputs: LayerInputs) -> LayerInputs:
    """Tensors that autograd may save, and that are no part of a graph."""
    past = inputs.past
    return LayerInputs(
        hidden=_plain(inputs.hidden),
        valid=_plain(inputs.valid),
        rotary=_plain(inputs.rotary),
        past=None if past is None else Past(_plain(past.keys), _plain(past.values), _plain(past.valid)),
        others=_plain(dict(inputs.others)),
        padded=inputs.padded,
    )


def _plain(value: Any) -> Any:
    """Tensors in tuples, lists and dicts: inference tensors are cloned, the rest only detached."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
