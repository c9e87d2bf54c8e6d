"""What the specs kept of a few images, drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...errors import InputError
from ...report.draw import overlay_from_report, seen_region
from ...spec import PipelineSpec
from ..answering import decode
from .results import EvaluationResults
from .rows import EvaluationRow
from .runner import Runner
from .task import Task

__all__ = ["Overlay", "overlays"]

SAMPLES, SPECS = 6, 4


@dataclass(frozen=True)
class Overlay:
    """One question with one spec.

    Attributes:
        question: in words.
        answer: the right one.
        spec: name of the spec.
        given: what was answered with it.
        right: whether that is right.
        png: the drawing as a `data:` address; empty where the tokens have no known place.
    """

    question: str
    answer: str
    spec: str
    given: str
    right: bool
    png: str


def overlays(
    model: Any, processor: Any, task: Task, specs: Sequence[PipelineSpec], results: EvaluationResults
) -> list[Overlay]:
    """Questions of different sub-tasks about different images, those first that some spec answered wrong.

    Args:
        model: the model.
        processor: its processor.
        task: the questions.
        specs: what is drawn, the first four.
        results: of the evaluation, to choose questions by.
    """
    runner = Runner(model, processor, task, 1)
    drawings = []
    for number in _chosen(task, [results.right[spec.name] for spec in specs]):
        sample = task.samples[number]
        for spec in specs[:SPECS]:
            row = EvaluationRow(spec.name, spec.name, spec=spec)
            pipeline, inputs = runner.pipeline(row), runner.inputs([([sample.load()], sample.question)], row)
            out = runner.generate(inputs, [sample], pipeline, task.max_new_tokens)
            (given,) = decode(processor, out)
            try:
                region = seen_region(sample.load(), processor)
                drawn = overlay_from_report([sample.load()], pipeline.report, regions=[region], panel_px=224)
            except InputError:
                png = ""
            else:
                png = _address(drawn)
            drawings.append(Overlay(sample.question, sample.answers[0], spec.name, given, sample.is_right(given), png))
    return drawings


def _chosen(task: Task, right: Sequence[str]) -> list[int]:
    """One question of each sub-task, wrong ones first, no image twice."""
    order = sorted(range(len(task.samples)), key=lambda i: (all(row[i] == "1" for row in right), i))
    chosen: list[int] = []
    for kinds_once in (True, False):
        for i in order:
            sample = task.samples[i]
            scenes, kinds = ([getattr(task.samples[j], name) for j in chosen] for name in ("scene", "kind"))
            if len(chosen) < SAMPLES and sample.scene not in scenes and not (kinds_once and sample.kind in kinds):
                chosen.append(i)
    return chosen


def _address(image: Image.Image) -> str:
    data = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
