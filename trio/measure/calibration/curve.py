"""The drop-all curve: what a model still says where an image is dropped whole after so many layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ...spec import Keep, PartSpec, PipelineSpec, StageSpec
from ..answering import GreedyAnswerer
from ..encoding import LIMIT
from ..extras import require
from ..fidelity import DESCRIBE, PromptSample
from ..statistics import FEW, Estimate
from .placement import absorption
from .report import CurvePoint, DropAllCurve
from .samples import CalibrationSet, Contender

__all__ = ["QUESTIONS", "curve_of", "drop_all_curve", "drop_all_spec"]

#: What is asked where no prompts are given: answers of several kinds, all of which need the image.
QUESTIONS = (
    DESCRIBE,
    "What is the most noticeable thing in this image, and where is it?",
    "Which colours does this image have?",
    "Which text can be read in this image?",
)
#: KL in nats at depth 0 below which the answers hardly depend on the images.
LITTLE = 0.01

Positions = Literal["auto", "compact", "original"]


def drop_all_curve(
    model: Any,
    processor: Any,
    samples: Sequence[PromptSample],
    *,
    positions: Positions = "original",
    max_new_tokens: int = 32,
    batch_size: int = 4,
    name: str | None = None,
    encoded_bytes: int = LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> DropAllCurve:
    """When a model takes an image in.

    For each depth, all visual tokens are dropped after so many layers, by a stage with ``keep: 0``. The greedy answer
    of the full model is then fed to both, and at each of its positions the distributions are compared. No labels are
    needed.

    Args:
        model: a vision-language model of transformers, in evaluation mode.
        processor: its processor.
        samples: what to ask; a few dozen images.
        positions: numbering of what is left, as in a spec.
        max_new_tokens: longest answer of the full model.
        batch_size: samples in a batch.
        name: of the model, for the report; its class where not given.
        encoded_bytes: features of a batch's images that are kept for the next depth, on the model's device.
        progress: told (batches done, batches in all) before the first batch and after each.

    Raises:
        InputError: there is no sample, a number is not positive, or an image cannot be read.
        UnsupportedModelError: no adapter takes the model.
    """
    require("scipy.stats", "calibration")
    answerer = GreedyAnswerer(model, processor, max_new_tokens=max_new_tokens)
    asked = CalibrationSet(answerer, samples, batch_size=batch_size, encoded_bytes=encoded_bytes)
    return curve_of(asked, positions, name or type(answerer.adapter.model).__name__, progress)


def curve_of(
    asked: CalibrationSet, positions: Positions, name: str, progress: Callable[[int, int], None] | None = None
) -> DropAllCurve:
    """As `drop_all_curve`, of what a set asks."""
    layers = len(asked.adapter.layers)
    contenders = [Contender.of([drop_all_spec(depth, positions)], asked.adapter) for depth in range(layers)]
    asked.ask(contenders, progress)
    kls = [asked.mean(contender.kl) for contender in contenders]
    nothing, everything = Estimate(mean=0.0, low=0.0, high=0.0), Estimate(mean=1.0, low=1.0, high=1.0)
    kls.append(nothing)
    agreed = [*(asked.share(contender.top1) for contender in contenders), everything]
    absorbed = absorption([kl.mean for kl in kls])
    notes = []
    if asked.images < FEW:
        notes.append(f"{asked.images} images are too few for intervals by bootstrap: they are too narrow")
    if kls[0].mean < LITTLE:
        notes.append(
            f"without any image the answers are nearly the same (KL {kls[0].mean:.4f} nats): these prompts hardly need "
            "the images, so the curve says little; ask about what is in them"
        )
    return DropAllCurve(
        model=name,
        images=asked.images,
        samples=len(asked.samples),
        positions=asked.positions,
        visual_tokens=contenders[0].tokens.visual / len(asked.samples),
        points=[
            CurvePoint(depth=depth, kl=kl, top1=top1, absorbed=share)
            for depth, (kl, top1, share) in enumerate(zip(kls, agreed, absorbed, strict=True))
        ],
        notes=notes,
    )


def drop_all_spec(depth: int, positions: Positions = "original") -> PipelineSpec:
    """All visual tokens are dropped after so many layers."""
    stage = StageSpec(
        after_layer=depth, keep=Keep(count=0), scorer=PartSpec(name="random"), selector=PartSpec(name="top-k")
    )
    return PipelineSpec(name=f"drop all after {depth}", stages=[stage], positions=positions)
