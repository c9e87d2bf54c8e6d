"""The floor of a spec: as many tokens, at the same places, drawn at random."""

from __future__ import annotations

from typing import Any

from ...spec import CompressorSpec, Keep, PartSpec, PipelineSpec


def random_floor(spec: PipelineSpec, *, seed: int = 0, entered: float | None = None) -> PipelineSpec:
    """The spec with random parts in place of its own.

    Args:
        spec: any spec.
        seed: another number gives another draw.
        entered: share of the tokens that the spec's compressor leaves; needed where it decides its own count.
    """
    chance = {"seed": seed}
    stages = [
        stage.model_copy(update={"scorer": PartSpec(name="random", params=chance), "selector": PartSpec(name="top-k")})
        for stage in spec.stages
    ]
    compressor = spec.compressor
    update: dict[str, Any] = {}
    if compressor is None and not stages:  # resized and nothing else: as many tokens in front of the language model
        update["resize"] = None
        compressor = CompressorSpec(name="random", keep=Keep.parse(spec.resize), params=chance)
    elif compressor is not None:
        keep = compressor.keep
        if keep is None:
            assert entered is not None  # measured by the caller
            keep = Keep(share=f"{100 * entered:.3f}%")
        compressor = CompressorSpec(name="random", keep=keep, if_fewer=compressor.if_fewer, params=chance)
    update |= {"name": f"{spec.name}, random", "stages": stages, "compressor": compressor}
    return spec.model_copy(update=update)
