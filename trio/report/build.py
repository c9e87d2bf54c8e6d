"""From the tensors that a prefill leaves behind to the report that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..core.tokens import KINDS, ImageTokens
from ..runtime.record import CompressedRecord, PrefillRecord, StageRecord
from ..runtime.stage import BoundStage
from ..scorers.base import SCORERS
from ..selectors.base import SELECTORS
from . import (
    CompressedImage,
    CompressionReport,
    CompressorReport,
    GroupReport,
    ImageReport,
    KVBytes,
    Origins,
    SampleReport,
    StageReport,
)


def make_report(
    record: PrefillRecord,
    *,
    spec_name: str,
    model: str,
    adapter: str,
    num_layers: int,
    stages: Sequence[BoundStage],
    positions: Literal["compact", "original"],
    notes: list[str],
    level: Literal["counts", "full"],
    resize: int | str | None = None,
) -> CompressionReport:
    """The report of a prefill; moves its tensors to the host."""
    on_host = {index: stage.on_host() for index, stage in record.stages.items()}
    compressed = None if record.compressed is None else _compressed_to_host(record.compressed)
    samples = []
    for number, images in enumerate(record.images):
        samples.append(
            SampleReport(
                sample=number,
                images=[
                    ImageReport(
                        tokens=image.tokens,
                        grid=image.grid,
                        grids=list(image.grids),
                        placed=image.placed,
                        entered=None if compressed is None else compressed.counts[number][place],
                    )
                    for place, image in enumerate(images)
                ],
                newlines=record.newlines[number] if record.newlines else 0,
                compressor=None if compressed is None or not images else _compressor_report(compressed, number, images),
                stages=[
                    _stage_report(stage, on_host[stage.index], number, record, level)
                    for stage in stages
                    if images and stage.index in on_host
                ],
            )
        )
    extra = ["tokens were given, not scored"] if record.replayed else []
    return CompressionReport(
        spec_name=spec_name,
        model=model,
        adapter=adapter,
        num_layers=num_layers,
        samples=samples,
        layer_lengths=list(record.layer_lengths),
        layer_tokens=[[tokens[number] for tokens in record.layer_tokens] for number in range(len(record.images))],
        positions=positions,
        notes=notes + extra,
        level=level,
        resize=resize,
        timing=dict(record.seconds) if level == "full" else None,
        kv_bytes=_kv_bytes(record) if level == "full" else None,
    )


def saliencies(record: PrefillRecord, stage: int) -> list[torch.Tensor]:
    """The saliencies that a stage gave, float32 ``(n,)`` on the CPU for each sample."""
    values = record.stages[stage].saliency
    out = []
    for number, images in enumerate(record.images):
        tokens = sum(image.tokens for image in images)
        out.append(torch.empty(0) if values is None else values[number, :tokens].float().cpu())
    return out


def _compressed_to_host(record: CompressedRecord) -> CompressedRecord:
    return replace(record, kept=record.kept.cpu(), merge_map=record.merge_map.cpu())


def _compressor_report(host: CompressedRecord, sample: int, images: tuple[ImageTokens, ...]) -> CompressorReport:
    reports, first = [], 0
    for number, image in enumerate(images):
        span = slice(first, first + image.tokens)
        indices = host.kept[sample, span].nonzero().squeeze(1)
        merge_map = host.merge_map[sample, span]
        reports.append(
            CompressedImage(
                tokens_in=image.tokens,
                asked=host.asked[sample][number],
                kept=len(indices),
                indices=indices.tolist(),
                origins=_origins([(number, image)], indices),
                merged=torch.where(merge_map < 0, -1, merge_map - first).tolist(),
            )
        )
        first += image.tokens
    return CompressorReport(name=host.name, images=reports, newlines=host.newlines[sample] if host.newlines else 0)


def _stage_report(
    stage: BoundStage, host: StageRecord, sample: int, record: PrefillRecord, level: Literal["counts", "full"]
) -> StageReport:
    images = record.images[sample]
    if stage.per == "sample":
        spans: list[tuple[int | None, int, list[tuple[int, ImageTokens]]]] = [(None, 0, list(enumerate(images)))]
    else:
        spans, first = [], 0
        for number, image in enumerate(images):
            spans.append((number, first, [(number, image)]))
            first += image.tokens
    before = sum(1 if stage.per == "sample" else len(earlier) for earlier in record.images[:sample] if earlier)
    groups = []
    for place, (image_number, first, members) in enumerate(spans):
        tokens = sum(image.tokens for _, image in members)
        kept = host.kept[sample, first : first + tokens]
        entered = host.entered[sample, first : first + tokens]
        indices = kept.nonzero().squeeze(1)
        asked = host.asked[before + place]
        saliency = None
        if level == "full" and host.saliency is not None:
            saliency = host.saliency[sample, first : first + tokens][entered].tolist()
        groups.append(
            GroupReport(
                image=image_number,
                tokens_in=int(entered.sum()),
                asked=asked,
                kept=int(kept.sum()),
                indices=indices.tolist(),
                origins=_origins(members, indices),
                saliency=saliency,
                notes=["kept all: no fewer were asked for"] if bool((kept == entered).all()) else [],
            )
        )
    return StageReport(
        after_layer=stage.after_layer,
        scorer=SCORERS.name_of(type(stage.scorer)) or type(stage.scorer).__name__,
        selector=SELECTORS.name_of(type(stage.selector)) or type(stage.selector).__name__,
        groups=groups,
        newlines=host.newlines[sample] if host.newlines else 0,
    )


def _origins(members: list[tuple[int, ImageTokens]], indices: torch.Tensor) -> Origins:
    """Origins of chosen tokens among those of one image, or of all images of a sample in a row."""
    number = torch.cat([torch.full((image.tokens,), n) for n, image in members])[indices]

    def column(name: str) -> list[int]:
        whole = torch.cat([getattr(image, name) for _, image in members])
        picked: list[int] = whole[indices].tolist()
        return picked

    return Origins(
        image=number.tolist(),
        kind=[KINDS[kind] for kind in column("kind")],
        frame=column("frame"),
        row=column("row"),
        column=column("column"),
        size=column("size"),
    )


def _kv_bytes(record: PrefillRecord) -> KVBytes | None:
    if not record.cache_bytes:
        return None
    return KVBytes(
        measured=sum(held for held, _ in record.cache_bytes),
        full_equivalent=sum(full for _, full in record.cache_bytes),
    )
