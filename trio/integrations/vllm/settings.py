"""Specs as an engine takes them: of the whole engine, of one request, and in the one form that keys are made of."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...core.tokens import ImageTokens, Signal
from ...encoders.compressors.base import COMPRESSORS, Compressor
from ...errors import InputError, SpecError, UnsupportedModelError
from ...runtime.encoder_side import split
from ...spec import PipelineSpec, load_spec
from ...spec.schedule import ResolvedSchedule, resolve

#: The key of the engine's `hf_overrides` and of a request's `mm_processor_kwargs`.
KEY = "trio"
#: What a request writes to have its images whole.
WHOLE = "none"
#: The compressors that the plugin has been tested with.
COMPRESSORS_TESTED = (
    *("average-pool", "divprune", "random", "uniform-grid"),  # read nothing off the tower
    *("prumerge", "scan", "visionzip", "vispruner"),
)


@dataclass(frozen=True)
class ServedTower:
    """What the plugin must know of a model's vision tower before an image is encoded.

    Attributes:
        depth: its blocks in the checkpoint, from whose end negative numbers in specs count.
        loaded: how many of them, the first ones, the engine loads.
        full: the blocks that see whole images; None: all.
        why: the reason why nothing can be read off it; empty where attention and keys can.
    """

    depth: int = 0
    loaded: int = 0
    full: tuple[int, ...] | None = None
    why: str = ""

    def absolute(self, signal: Signal) -> Signal:
        """The signal with its block counted from 0."""
        return signal if signal.layer >= 0 else replace(signal, layer=signal.layer + self.depth)

    def lacks(self, signal: Signal) -> str:
        """Why a signal cannot be read, as the end of a sentence; empty where it can."""
        if self.why:
            return self.why
        if signal.kind not in ("attention", "keys"):
            return f"{signal.kind!r} is not read in this engine"
        block: int | None = self.absolute(signal).layer
        if self.full is not None:
            block = min((full for full in self.full if block is not None and full >= block), default=None)
        if block is None or not 0 <= block < self.depth:
            return f"the tower has {self.depth} blocks, and none from there on that sees a whole image"
        if block >= self.loaded:
            return (
                f"the engine loads the first {self.loaded} of {self.depth} blocks, those that the features come "
                f"through. Write layer: {self.loaded - 1 - self.depth}"
            )
        return ""


@dataclass(frozen=True)
class ServedFamily:
    """What the plugin must know of a model before an image is encoded.

    Attributes:
        name: of the family, as in messages.
        positions: how vLLM numbers the tokens that are left.
        why: the reason, for a spec that asks for another numbering.
        has_newlines: whether newline tokens end the rows of its images.
        tower: of this model.
    """

    name: str
    positions: Literal["compact", "original"]
    why: str
    has_newlines: bool = False
    tower: ServedTower = ServedTower(why="nothing is read off the towers of such models in this engine")


@dataclass(frozen=True)
class EngineSpec:
    """A spec that an engine can carry out.

    Attributes:
        text: JSON, equal for equal specs: the part of an item's key that tells one spec from another.
        spec: the spec.
        compressor: built from it.
        schedule: its numbers.
    """

    text: str
    spec: PipelineSpec
    compressor: Compressor
    schedule: ResolvedSchedule

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Tokens to leave of each input of the tower (a tile) of one image.

        Args:
            sizes: tokens of each.

        Raises:
            BudgetError: the image has fewer tokens than the count, and the spec says that this is an error.
        """
        if self.compressor.decides_count:
            return [self._decided(size) for size in sizes]
        keep = self.spec.compressor.keep if self.spec.compressor is not None else None
        if keep is not None and keep.per == "tile":
            return [self._count(size) for size in sizes]
        return split(self._count(sum(sizes)), sizes, [float(size) for size in sizes])

    def _decided(self, tokens: int) -> int:
        count = self.compressor.decided_count(tokens)
        assert count is not None  # refused in `read_spec`
        return count

    def _count(self, started: int) -> int:
        count = self.schedule.compressed_count(started)
        assert count is not None  # refused in `read_spec`
        return count


def written_spec(source: object, family: ServedFamily) -> PipelineSpec:
    """A spec in any of the forms that an engine takes.

    Args:
        source: a compressor's name with a count or a share (``"divprune-64"``, ``"divprune-11.1%"``), the name of a
            shipped spec, the path of a file, JSON text, a mapping or a `PipelineSpec`.
        family: of the model. Short names take its positions, and drop newlines.

    Raises:
        TrioError: as `load_spec`.
    """
    if isinstance(source, str):
        if source.lstrip().startswith("{"):
            try:
                source = json.loads(source)
            except json.JSONDecodeError as error:
                raise SpecError(f"{KEY}: found text that is no JSON object ({error}); write a mapping") from error
        else:
            name, _, count = source.rpartition("-")
            if name in COMPRESSORS.names() and (count.isdigit() or count.endswith("%")):
                keep = int(count) if count.isdigit() else count
                source = {
                    "name": source,
                    "compressor": {"name": name, "keep": keep},
                    "positions": "auto",
                    "newlines": "never" if family.has_newlines else "with-row",
                }
    if not isinstance(source, str | Path | Mapping | PipelineSpec):
        raise InputError(
            f"{KEY}: found {type(source).__name__}; give a name such as 'divprune-64', a mapping, or {WHOLE!r}"
        )
    return load_spec(source)


def read_spec(
    source: object, family: ServedFamily, compressors: Sequence[str] = COMPRESSORS_TESTED
) -> EngineSpec | None:
    """A spec, checked against what an engine can do before anything runs.

    Args:
        source: see `written_spec`; None and ``"none"``: images stay whole.
        family: of the model.
        compressors: the names that are allowed.

    Raises:
        TrioError: the spec is wrong, or cannot work in this engine on this family.
    """
    if source is None or source == WHOLE:
        return None
    if isinstance(source, str):
        return _read_text(source, family, tuple(compressors))
    return _read(written_spec(source, family), family, compressors)


@functools.lru_cache(maxsize=256)
def _read_text(source: str, family: ServedFamily, compressors: tuple[str, ...]) -> EngineSpec:
    return _read(written_spec(source, family), family, compressors)


def _read(spec: PipelineSpec, family: ServedFamily, compressors: Sequence[str]) -> EngineSpec:
    place = f"{KEY}: spec {spec.name!r}"
    if not spec.engine_ready:
        raise UnsupportedModelError(f"{place}: {spec.engine_ready.reason}.")
    named = spec.compressor
    assert named is not None  # engine_ready
    if named.name not in compressors or named.obj is not None:
        raise UnsupportedModelError(
            f"{place}: the compressor {named.name!r} was not tested in this engine; tested are "
            f"{', '.join(compressors)}. Others work through image embeddings (trio export-embeds)."
        )
    compressor: Compressor = COMPRESSORS.build(named)
    if compressor.decides_count and compressor.decided_count(1) is None:
        raise UnsupportedModelError(
            f"{place}: how many tokens {named.name!r} leaves is known only when the image has been encoded, and the "
            "engine lays out the prompt before; write its `share` without `plus`, or use image embeddings (trio "
            "export-embeds)."
        )
    if not compressor.decides_count and named.keep is None:
        raise UnsupportedModelError(f"{place}: compressor.keep is missing; say how many tokens {named.name!r} leaves.")
    for signal in compressor.reads():
        if lack := family.tower.lacks(signal):
            raise UnsupportedModelError(
                f"{place}: {named.name!r} reads {signal.kind} of block {signal.layer} of the vision tower: {lack}. "
                "Others work through image embeddings where the model takes them (trio export-embeds)."
            )
    if named.split != "even":
        raise UnsupportedModelError(
            f"{place}: compressor.split: found {named.split!r}, which this engine does not do; write split: even."
        )
    positions = family.positions if spec.positions == "auto" else spec.positions
    if positions != family.positions:
        raise UnsupportedModelError(
            f"{place}: positions: found {positions!r}; {family.why}. Write positions: {family.positions}."
        )
    if family.has_newlines and spec.newlines == "with-row":
        raise UnsupportedModelError(
            f"{place}: newlines: found 'with-row'; which rows keep a token is known only when the image has been "
            "encoded, and the engine lays out the prompt before. Write newlines: never or newlines: always."
        )
    same = spec.model_copy(update={"name": "engine", "description": "", "source": "", "positions": positions})
    text = json.dumps(same.to_dict(), sort_keys=True)
    return EngineSpec(text, same, compressor, resolve(same, 1))


def pieces_of(tiles: Any) -> list[Any]:
    """The tokens of each input of the tower, from int64 ``(n,)`` that says which input each token comes from."""
    return [(tiles == tile).nonzero().squeeze(1) for tile in sorted(set(tiles.tolist()))]


def without_newlines(image: ImageTokens) -> ImageTokens:
    """The tokens of an image that are no structure."""
    return image.select(image.is_visual.nonzero().squeeze(1))
