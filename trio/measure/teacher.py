"""Teacher forcing: how alike two models are at every position of one answer, whatever they would say themselves.

The full model's greedy answer is fed to both. At each of its positions both give a distribution of the next token,
behind the same tokens, so that positions late in a long answer can be compared; a model left to itself is somewhere
else after the first token that differs.

`generate` itself runs, with a logits processor that names the next token: prompts are prefilled, compressed and
decoded as in any other call, so that the kept tokens are those of a free answer, and every family that generates works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, UnsupportedModelError
from .answering import GREEDY, answer_length

__all__ = [
    "PositionAgreement",
    "ReferenceAnswer",
    "compare_positions",
    "forced_logits",
    "greedy_answer",
    "kl",
    "teacher_forced",
]


@dataclass(frozen=True)
class ReferenceAnswer:
    """Greedy answers to a batch of B prompts, of T tokens at most.

    Attributes:
        tokens: int64 ``(B, T)``, without the prompts; padding behind the end of an answer.
        lengths: tokens of each answer, its end token included.
        logits: float32 ``(B, T, V)``, before any processing by `generate`: at t those that token t was chosen from.
            Behind the end of an answer they mean nothing.
    """

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True)
class PositionAgreement:
    """Two models at the n positions of one answer, the end token's included.

    Attributes:
        top1: whether the most probable token is the same.
        kl: KL(full || other) of the distributions, in nats, 0 or more.
    """

    top1: tuple[bool, ...]
    kl: tuple[float, ...]


def greedy_answer(
    model: Any,
    inputs: Mapping[str, Any],
    context: AbstractContextManager[Any] | None = None,
    *,
    max_new_tokens: int,
) -> ReferenceAnswer:
    """What a model answers to a batch, with its logits.

    Args:
        model: in evaluation mode.
        inputs: what its forward takes, on its device, padded on the left.
        context: entered while it runs: a pipeline, or None for the full model.
        max_new_tokens: longest answer.
    """
    tokens, logits = _generate(model, inputs, context, max_new_tokens=max_new_tokens)
    return ReferenceAnswer(tokens, tuple(answer_length(model, one) for one in tokens), logits)


def teacher_forced(
    model: Any, inputs: Mapping[str, Any], full: ReferenceAnswer, context: AbstractContextManager[Any] | None = None
) -> list[PositionAgreement]:
    """How a compressed model agrees with the full one at every position of the full model's answers.

    Args:
        model: in evaluation mode.
        inputs: the batch of B prompts that `full` answers; images may be resized ones.
        full: answers of the full model, see `greedy_answer`.
        context: entered while the model runs: the pipeline.

    Returns:
        One for each prompt.

    Raises:
        TrioError: see `forced_logits`.
    """
    return compare_positions(full, forced_logits(model, inputs, full.tokens, context))


def forced_logits(
    model: Any, inputs: Mapping[str, Any], tokens: torch.Tensor, context: AbstractContextManager[Any] | None = None
) -> torch.Tensor:
    """The logits of a model that is made to give an answer.

    Args:
        model: in evaluation mode.
        inputs: what its forward takes, on its device, padded on the left.
        tokens: int64 ``(B, T)``, the answers; what stands behind an end token is not fed.
        context: entered while the model runs: a pipeline, or None for the full model.

    Returns:
        float32 ``(B, T, V)``: at t the logits behind prompt and tokens ``[:, :t]``. Behind an end token they mean
        nothing.

    Raises:
        InputError: there is no token, or the model stopped before the longest answer was at its end.
        UnsupportedModelError: the model's `generate` is its own, and takes no logits processor.
    """
    batch, prompt = inputs["input_ids"].shape
    if tokens.shape[0] != batch or tokens.shape[1] == 0:
        raise InputError(
            f"tokens: found the shape {tuple(tokens.shape)} for {batch} prompts; give (prompts, tokens), one or more"
        )
    steps = tokens.shape[1]
    given, logits = _generate(model, inputs, context, max_new_tokens=steps, forced=[_Forced(tokens, prompt)])
    lengths = [answer_length(model, one) for one in tokens]
    if logits.shape[1] < max(lengths):
        raise InputError(
            f"generate: it stopped after {logits.shape[1]} of {max(lengths)} tokens of an answer; take stopping "
            "criteria (stop_strings, max_time) out of the model's generation_config"
        )
    if any(one[:n].tolist() != other[:n].tolist() for one, other, n in zip(given, tokens, lengths, strict=True)):
        raise UnsupportedModelError(
            f"generate: {type(model).__name__} gave other tokens than it was told to: it does not pass "
            "`logits_processor` on; compare first tokens and free answers on this model"
        )
    if logits.shape[1] == steps:
        return logits
    return torch.cat([logits, logits.new_zeros(batch, steps - logits.shape[1], logits.shape[2])], 1)


def compare_positions(full: ReferenceAnswer, logits: torch.Tensor) -> list[PositionAgreement]:
    """Compares logits ``(B, T, V)`` behind the full model's answers with its own: one result for each prompt."""
    host = "cpu" if logits.device.type == "mps" else logits.device  # which has no float64
    same, nats = [], []
    for step in range(full.logits.shape[1]):  # one at a time: a vocabulary in float64 is large
        one, other = full.logits[:, step].to(host), logits[:, step].to(host)
        same.append(one.argmax(-1) == other.argmax(-1))
        nats.append(kl(one, other))
    top1, divergence = torch.stack(same, 1).tolist(), torch.stack(nats, 1).tolist()
    return [
        PositionAgreement(tuple(top1[row][:length]), tuple(divergence[row][:length]))
        for row, length in enumerate(full.lengths)
    ]


def kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) of the distributions behind logits ``(B, V)``: float64 ``(B,)``, in nats, 0 or more.

    Tokens that the full model rules out (a logit of -inf) count nothing, whatever the other one says of them.
    """
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    terms = torch.where(p == float("-inf"), 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0.0)


class _Forced:
    """A logits processor that leaves one token of each row: the given one."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` in which the next token of each answer is the only one."""
        token = self._tokens[:, input_ids.shape[1] - self._prompt, None].to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def _generate(
    model: Any,
    inputs: Mapping[str, Any],
    context: AbstractContextManager[Any] | None,
    *,
    max_new_tokens: int,
    forced: Sequence[_Forced] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``(B, T)`` that `generate` adds to a batch, and the logits ``(B, T, V)`` that they were chosen from."""
    with context or nullcontext(), torch.no_grad():
        out = model.generate(
            **inputs,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            logits_processor=list(forced),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1).float()
