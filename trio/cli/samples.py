"""What commands ask a model: images of the user's own, or the bundled questions."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from ..measure.fidelity import PromptSample

__all__ = ["BundledTask", "TaskName", "bundled_samples", "check_source"]


class BundledTask(StrEnum):
    """Bundled questions."""

    shapesvqa = "shapesvqa"


TaskName = Annotated[BundledTask | None, typer.Option("--task", help="Bundled questions in place of own images.")]


def check_source(images: Path | None, prompts: Path | None, task: BundledTask | None) -> None:
    """Refuses options that name no source of samples, or two.

    Raises:
        InputError: they do.
    """
    from ..errors import InputError

    if (task is None) == (images is None):
        raise InputError("samples: give either --images FOLDER, with prompts of your own, or --task shapesvqa.")
    if task is not None and prompts is not None:
        raise InputError("--prompts: a task has questions of its own; leave it out, or give --images.")


def bundled_samples(network: Any, limit: int | None) -> list[PromptSample]:
    """Questions of the split for choosing, of 40 scenes or `limit`; the split that is reported stays unseen."""
    from ..measure.fidelity import PromptSample
    from ..measure.shapesvqa.task import canvas_for, shapesvqa

    questions = shapesvqa("validation", limit=limit or 40, canvas=canvas_for(network))
    return [PromptSample(one.load(), one.question, f"scene {one.scene}") for one in questions.samples]
