"""Greedy answers of a model to a batch, with the first token's logits and times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters import adapter_for
from ...core.images import batch_for
from ...errors import InputError
from ...pipeline import Pipeline
from ...report import CompressionReport
from .samples import Sample


@dataclass(frozen=True)
class Answered:
    """Answers to a batch of B prompts.

    Attributes:
        logits: of the first token, float32 ``(B, V)`` on the CPU, before any processing by `generate`.
        texts: B answers, special tokens left out.
        first_token: seconds from the call of `generate` to the first token.
        answer: seconds to the end.
        report: of the pipeline; None without one.
    """

    logits: torch.Tensor
    texts: list[str]
    first_token: float
    answer: float
    report: CompressionReport | None


class Answerer:
    """Asks a model in batches, with a pipeline or without."""

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int) -> None:
        """Binds a model and its processor; `max_new_tokens` is the longest answer.

        Raises:
            UnsupportedModelError: no adapter takes the model.
            InputError: the model is in training mode.
        """
        if model.training:
            raise InputError("model: it is in training mode, where answers are random; call model.eval() first.")
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.adapter = adapter_for(model)

    def inputs(self, samples: Sequence[Sample]) -> Any:
        """A batch on the model's device.

        Raises:
            InputError: a picture cannot be read, or the processor cannot write such a batch.
        """
        made = batch_for(self.processor, [([sample.load()], sample.prompt) for sample in samples])
        return made.to(self.model.device, dtype=self.model.dtype)

    def __call__(self, inputs: Any, pipeline: Pipeline | None = None, *, max_new_tokens: int | None = None) -> Answered:
        """Answers a batch."""
        prompt = inputs["input_ids"].shape[1]
        with pipeline or nullcontext(), _FirstToken.of(self.adapter.model) as first, torch.no_grad():
            _wait(self.model)
            start = time.perf_counter()
            out = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens or self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                **_NOT_SAMPLED,
            )
            _wait(self.model)
            end = time.perf_counter()
        texts = self.processor.batch_decode(out[:, prompt:], skip_special_tokens=True)
        return Answered(
            logits=first.logits.float().cpu(),
            texts=[text.strip() for text in texts],
            first_token=first.time - start,
            answer=end - start,
            report=None if pipeline is None else pipeline.report,
        )


#: Settings of checkpoints that sample by default; set, they only make `generate` warn.
_NOT_SAMPLED = {"temperature": None, "top_p": None, "top_k": None}


class _FirstToken:
    """Notes when the first forward ended, and its logits at the last place."""

    logits: torch.Tensor
    time: float

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._seen = False

    @classmethod
    @contextmanager
    def of(cls, model: torch.nn.Module) -> Iterator[_FirstToken]:
        watch = cls(model)
        handle = model.register_forward_hook(watch._after)
        try:
            yield watch
        finally:
            handle.remove()

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._seen:
            self._seen = True
            _wait(self._model)
            self.time = time.perf_counter()
            self.logits = output.logits[:, -1].detach()


def _wait(model: Any) -> None:
    """Queued work of an accelerator is waited for, so that clocks mean something."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
