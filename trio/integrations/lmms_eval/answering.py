"""Batches of conversations, answered by a model with or without a pipeline. Knows nothing of lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...measure.answering import answer_length, generate
from .requests import Conversation, cut

if TYPE_CHECKING:
    from ...pipeline import Pipeline


@dataclass(frozen=True)
class ConversationAnswer:
    """The answer to a conversation.

    Attributes:
        text: without what the task's stop strings cut off.
        tokens: generated, the end token included.
        visual: visual tokens of its images.
        kept: of these, kept on average over the decoder layers.
    """

    text: str
    tokens: int
    visual: float = 0.0
    kept: float = 0.0


class ConversationAnswerer:
    """A model that answers batches of conversations.

    Args:
        model: in evaluation mode.
        processor: its own, with a chat template.
        pipeline: bound to the model; None: the full model.
    """

    def __init__(self, model: Any, processor: Any, pipeline: Pipeline | None) -> None:
        self.model, self.pipeline = model, pipeline
        self.processor = processor if pipeline is None else pipeline.processor(processor)

    def answer(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any], until: Sequence[str]
    ) -> list[ConversationAnswer]:
        """The answers to a batch.

        Args:
            conversations: one a request; with and without images.
            options: of ``generate``.
            until: strings that end an answer.

        Raises:
            InputError: the model gives another number of answers than it was asked for.
        """
        answers: list[ConversationAnswer | None] = [None] * len(conversations)
        # Not every processor takes a batch in which some prompts have images and some have none.
        for seeing in (True, False):
            rows = [row for row, one in enumerate(conversations) if bool(one.images) is seeing]
            if rows:
                found = self._generate([conversations[row] for row in rows], options, until, seeing)
                for row, answer in zip(rows, found, strict=True):
                    answers[row] = answer
        return [answer for answer in answers if answer is not None]

    def _generate(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any], until: Sequence[str], seeing: bool
    ) -> list[ConversationAnswer]:
        inputs = self.processor.apply_chat_template(
            [one.messages for one in conversations],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, dtype=self.model.dtype)
        padding = self.processor.tokenizer.pad_token_id
        new = generate(self.model, inputs, self.pipeline, options=options, pad_token_id=padding)
        if len(new) != len(conversations):
            raise InputError(f"generate: {len(new)} answers to {len(conversations)} requests; check generation_kwargs.")
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        counts = self._counts(len(conversations)) if seeing else [(0.0, 0.0)] * len(conversations)
        return [
            ConversationAnswer(cut(text, until), answer_length(self.model, row), visual, kept)
            for text, row, (visual, kept) in zip(texts, new, counts, strict=True)
        ]

    def _counts(self, rows: int) -> list[tuple[float, float]]:
        """For each row of the last prefill its visual tokens, and how many of them were kept on average."""
        if self.pipeline is None:
            return [(0.0, 0.0)] * rows
        report = self.pipeline.report
        each = len(report.samples) // rows  # beams repeat a row
        chosen = report.samples[::each]
        return [(sample.visual_tokens, sample.average_kept(report.num_layers)) for sample in chosen]
