"""Whether a spec can be decided before the language model runs, as engines with a paged cache need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..registry import registry_of

if TYPE_CHECKING:
    from .models import PipelineSpec


@dataclass(frozen=True)
class EngineReadiness:
    """The answer of `PipelineSpec.engine_ready`; true where the spec is ready.

    Attributes:
        reason: why not, and what to change; empty where it is ready.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def engine_readiness(spec: PipelineSpec) -> EngineReadiness:
    """See `PipelineSpec.engine_ready`.

    Raises:
        UnknownNameError: there is no compressor of that name.
    """
    if spec.resize is not None:
        return EngineReadiness(
            "resize: found a size of images; an engine's own processor reads them. Give it smaller images (or a lower "
            "number of pixels in its processor's settings), and leave `resize` out"
        )
    if spec.stages or spec.compressor is None:
        return EngineReadiness(
            "stages[0]: found a reduction inside the language model, after which its layers hold different numbers of "
            "keys; a paged cache has one number for all layers. Use a compressor alone, or transformers"
        )
    compressor = spec.compressor
    if compressor.keep is not None and compressor.keep.per == "sample":
        return EngineReadiness(
            "compressor.keep.per: found 'sample', which makes an image's tokens depend on the other images of its "
            "prompt; engines keep images by their content alone. Use per: image"
        )
    part = registry_of("compressor").get(compressor.name) if compressor.obj is None else compressor.obj
    if getattr(part, "draws", False) and "seed" not in compressor.params:
        return EngineReadiness(
            f"compressor: {compressor.name!r} draws, and no seed is written; engines keep an image's tokens for all "
            "prompts about it. Write `seed` in the compressor's mapping"
        )
    return EngineReadiness()
