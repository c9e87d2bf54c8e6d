"""The model ``trio`` of lmms-eval."""

from __future__ import annotations

import time
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from ...errors import InputError
from ...pipeline import Pipeline
from .answering import ConversationAnswer, ConversationAnswerer
from .requests import batches, conversation, generation
from .settings import Settings, load


class TrioModel(lmms):  # type: ignore[misc]  # lmms-eval has no types, and is not installed where this is checked
    """A vision-language model on stock transformers, compressed by a spec, as a chat model of lmms-eval.

    Args:
        arguments: of ``--model_args``; see `Settings`.

    Raises:
        InputError: an argument is unknown, missing or not allowed, or the model cannot be loaded.
        TrioError: the spec is wrong, or does not fit the model.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.settings = Settings.from_arguments(arguments)
        self._model, self.processor = load(self.settings)
        spec = self.settings.spec
        pipeline = None if spec is None else Pipeline.from_spec(spec, self._model)
        self._answerer: ConversationAnswerer | None = ConversationAnswerer(self._model, self.processor, pipeline)
        self._device = torch.device(self._model.device)
        self._system_prompt = self._resolve_system_prompt(self.settings.system_prompt)
        self._square: tuple[int, int, int] | None = None
        if self.settings.pad_to_square:
            red, green, blue = self.processor.image_processor.image_mean
            self._square = (int(red * 255), int(green * 255), int(blue * 255))

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Requests in one call of ``generate``."""
        return self.settings.batch_size

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answers to a run's requests, in their order; logs the average retention of each task.

        Raises:
            InputError: a task brings something else than text and images, or an option that ``generate`` lacks.
        """
        if self._answerer is None:
            raise InputError("model: lmms-eval has called `clean`, which frees the model; make a new one.")
        arguments = [request.args for request in requests]
        answers: list[ConversationAnswer | None] = [None] * len(arguments)
        begin = time.perf_counter()
        groups = batches([(one[0], one[2]) for one in arguments], self.settings.batch_size)
        with tqdm(total=len(arguments), disable=self.rank != 0, desc="trio") as bar:
            for group in groups:
                options, until = generation(arguments[group[0]][2], max_new_tokens=self.settings.max_new_tokens)
                conversations = [self._conversation(*arguments[index]) for index in group]
                for index, answer in zip(group, self._answerer.answer(conversations, options, until), strict=True):
                    answers[index] = answer
                bar.update(len(group))
        done = [answer for answer in answers if answer is not None]
        self._log([one[4] for one in arguments], done, time.perf_counter() - begin)
        return [GenerationResult(one.text, TokenCounts(output_tokens=one.tokens)) for one in done]

    def _conversation(self, _text: str, messages_of: Any, _options: Any, number: int, task: str, split: str) -> Any:
        """A request's prompt, from the task's own document."""
        return conversation(
            messages_of(self.task_dict[task][split][number]),
            system_prompt=self._system_prompt,
            square=self._square,
            placeholder=getattr(self.processor, "image_token", None),
        )

    def _log(self, tasks: list[str], answers: list[ConversationAnswer], seconds: float) -> None:
        """Speed and retention, in the log and in the ``throughput`` of the results."""
        metrics: dict[str, float] = {}
        spec = self.settings.spec
        for task in [*dict.fromkeys(tasks), None]:
            of_task = [one for name, one in zip(tasks, answers, strict=True) if task in (name, None) and one.visual]
            visual, kept = sum(one.visual for one in of_task), sum(one.kept for one in of_task)
            if not visual:
                continue
            n = len(of_task)
            logger.info(
                f"trio: {spec} on {task or 'all tasks'}: {kept / n:.1f} of {visual / n:.1f} visual tokens kept on "
                f"average over the layers ({kept / visual:.1%}), {n} answers"
            )
            suffix = "" if task is None else f"_{task}"
            metrics |= {f"retention{suffix}": kept / visual, f"visual_tokens{suffix}": visual / n}
        tokens = sum(one.tokens for one in answers)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=metrics,
        )

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        """Refused: none of the paper's tasks asks for it.

        Raises:
            InputError: always.
        """
        raise InputError(
            "task: it asks for log-likelihoods of given answers, which `--model trio` does not compute; choose a task "
            "whose output_type is generate_until."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Refused: a round's prompt would depend on the answer before it.

        Raises:
            InputError: always.
        """
        raise InputError(
            "task: it has several rounds, which `--model trio` does not play; choose a task whose output_type is "
            "generate_until."
        )

    def clean(self) -> None:
        """Frees the model."""
        self._answerer = None
        super().clean()
