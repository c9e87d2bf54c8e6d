"""Answers of a model to a batch: one way to ask, for evaluation, fidelity, tuning and lmms-eval."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..adapters import adapter_for
from ..core.images import batch_for
from ..errors import InputError
from ..pipeline import Pipeline
from ..report import CompressionReport

if TYPE_CHECKING:
    from .encoding import EncodedImages

__all__ = ["GREEDY", "BatchAnswers", "GreedyAnswerer", "answer_length", "decode", "end_tokens", "generate", "wait"]

#: Options of `generate` for greedy answers, whatever the checkpoint has as its default.
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    # Settings of checkpoints that sample by default; set, they only make `generate` warn.
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    context: AbstractContextManager[Any] | None = None,
    *,
    options: Mapping[str, Any] = GREEDY,
    **more: Any,
) -> torch.Tensor:
    """The tokens that a model adds to a batch, int64 ``(B, T)``, without the prompts.

    Args:
        model: in evaluation mode.
        inputs: what its forward takes, on its device, padded on the left.
        context: entered while it runs: a pipeline, or None for the full model.
        options: of `generate`; greedy where not given.
        more: further options, such as ``max_new_tokens``.
    """
    with context or nullcontext(), torch.no_grad():
        tokens: torch.Tensor = model.generate(**inputs, **options, **more)
    return tokens[:, inputs["input_ids"].shape[1] :]


def decode(processor: Any, tokens: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
    """Answers as text, without special tokens and the blanks around them."""
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def end_tokens(model: Any) -> frozenset[int]:
    """Tokens that end an answer of the model; empty where there are none."""
    end = model.generation_config.eos_token_id
    return frozenset((end,) if isinstance(end, int) else end or ())


def answer_length(model: Any, tokens: torch.Tensor) -> int:
    """Tokens of one answer, int64 ``(T,)``, up to its end token, which counts."""
    ends = end_tokens(model)
    return next((number for number, token in enumerate(tokens.tolist(), start=1) if token in ends), len(tokens))


def wait(device: torch.device) -> None:
    """Until queued work of an accelerator is done, so that clocks mean something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class BatchAnswers:
    """Answers to a batch of B prompts.

    Attributes:
        logits: of the first token, float32 ``(B, V)`` on the CPU, before any processing by `generate`.
        tokens: int64 ``(B, T)``, without the prompts, padded behind the end of an answer.
        steps: of every token, float32 ``(B, T, V)`` on the CPU; None where they were not asked for.
        texts: B answers, special tokens left out.
        first_token: seconds from the call of `generate` to the first token. Where images were not encoded again, the
            seconds that encoding them took before are part of it.
        answer: seconds to the end; likewise.
        report: of the pipeline; None without one.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    steps: torch.Tensor | None
    texts: list[str]
    first_token: float
    answer: float
    report: CompressionReport | None


class GreedyAnswerer:
    """Asks a model in batches, with a pipeline or without, and notes the first token's logits and times."""

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

    def prepare(self, prompts: Sequence[tuple[Sequence[Image.Image], str]]) -> Any:
        """A batch on the host, from the images and the text of each prompt; touches no device.

        Raises:
            InputError: the processor cannot write such a batch.
        """
        return batch_for(self.processor, prompts)

    def on_device(self, batch: Any) -> Any:
        """A batch of `prepare`, on the model's device and in its dtype."""
        return batch.to(self.model.device, dtype=self.model.dtype)

    def inputs(self, prompts: Sequence[tuple[Sequence[Image.Image], str]]) -> Any:
        """A batch on the model's device; see `prepare`."""
        return self.on_device(self.prepare(prompts))

    def __call__(
        self,
        inputs: Any,
        pipeline: Pipeline | None = None,
        *,
        max_new_tokens: int | None = None,
        memory: EncodedImages | None = None,
        steps: bool = False,
    ) -> BatchAnswers:
        """Answers a batch; with a memory, images that it knows are not encoded again.

        Args:
            inputs: of `on_device`.
            pipeline: attached for the call; None: the full model.
            max_new_tokens: longest answer; None: as the answerer was told.
            memory: of encoded images.
            steps: whether to keep the logits of every token.
        """
        reused = nullcontext() if memory is None else memory.reused(pipeline)
        before = 0.0 if memory is None else memory.saved_seconds
        # Attaching is not timed.
        with reused, pipeline or nullcontext(), _FirstToken.of(self.adapter.model, steps) as first:
            wait(self.model.device)
            start = time.perf_counter()
            tokens = generate(self.model, inputs, max_new_tokens=max_new_tokens or self.max_new_tokens)
            wait(self.model.device)
            end = time.perf_counter()
        saved = 0.0 if memory is None else memory.saved_seconds - before
        return BatchAnswers(
            logits=first.logits.float().cpu(),
            tokens=tokens.cpu(),
            steps=torch.stack([one.float().cpu() for one in first.steps], 1) if steps else None,
            texts=decode(self.processor, tokens),
            first_token=first.time - start + saved,
            answer=end - start + saved,
            report=None if pipeline is None else pipeline.report,
        )


class _FirstToken:
    """Notes when the first forward ended, and its logits at the last position; where wanted, those of all forwards."""

    logits: torch.Tensor
    time: float

    def __init__(self, model: torch.nn.Module, all_steps: bool) -> None:
        self._model, self._all_steps = model, all_steps
        self._seen = False
        self.steps: list[torch.Tensor] = []

    @classmethod
    @contextmanager
    def of(cls, model: torch.nn.Module, all_steps: bool) -> Iterator[_FirstToken]:
        watch = cls(model, all_steps)
        handle = model.register_forward_hook(watch._after)
        try:
            yield watch
        finally:
            handle.remove()

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._seen:
            self._seen = True
            device: Any = self._model.device
            wait(device)
            self.time = time.perf_counter()
            self.logits = output.logits[:, -1].detach()
        if self._all_steps:
            self.steps.append(output.logits[:, -1].detach().clone())
