"""What a spec must not say: shares that are none, stages out of order, counts that grow, budgets that contradict."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, cast

from .messages import Wrong, path

if TYPE_CHECKING:
    from . import Budget, CompressorSpec, Keep, StageSpec

__all__ = ["check_budget", "check_groups", "check_growth", "check_order", "format_share", "parse_share"]


def parse_share(text: object) -> Fraction:
    """The exact value of a percentage such as "5.6%"; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text) if isinstance(text, str) and len(text) < 40 else None
    if match is None:
        raise ValueError(f"{text!r} is not a percentage")
    return Fraction(match[1]) / 100


def format_share(share: Fraction) -> str:
    """The shortest percentage with the exact value of `share` (which has to be a decimal fraction)."""
    value = Decimal(share.numerator * 100) / Decimal(share.denominator)
    return f"{value.normalize():f}%"


def check_order(stages: list[StageSpec]) -> None:
    """Refuse stages at one layer or out of order, as far as that shows before the depth is known."""
    # A share against a number is decided when the depth is known: the two kinds are in order each for itself.
    seen: dict[type, list[tuple[int, int | Fraction]]] = {int: [], str: []}
    for index, stage in enumerate(stages):
        here = stage.after_layer
        depth = here if isinstance(here, int) else parse_share(here)
        before = seen[type(here)]
        if before and depth <= before[-1][1]:
            earlier, earlier_depth = next(one for one in before if depth <= one[1])
            if depth == earlier_depth:
                raise Wrong(
                    f"found {here!r}, which stages[{earlier}] has too; two stages cannot act at one layer. Move one of "
                    "them, or merge them.",
                    ("stages", index, "after_layer"),
                )
            raise Wrong(
                f"found {here!r} after stages[{earlier}] at {stages[earlier].after_layer!r}; list the stages in the "
                "order of the layers.",
                ("stages", index, "after_layer"),
            )
        before.append((index, depth))


def check_groups(compressor: CompressorSpec | None, stages: list[StageSpec]) -> None:
    """Refuse numbers for tiles where there are none: in the language model, or with a split of a larger number."""
    for index, stage in enumerate(stages):
        if stage.keep.per == "tile":
            raise Wrong(
                "found per: tile; tiles are known on the encoder side only. A stage counts for each image, or for all "
                "images of a sample.",
                ("stages", index, "keep", "per"),
            )
    if compressor is None or compressor.split == "even":
        return
    if compressor.keep is None or compressor.keep.per == "tile":
        raise Wrong(
            "found split: saliency, but there is no number to split over tiles; give `keep` for each image or sample.",
            ("compressor", "split"),
        )


def check_growth(compressor: CompressorSpec | None, stages: list[StageSpec]) -> None:
    """Refuse a count above an earlier count, and a share of the start above an earlier one."""
    seen: dict[tuple[str, str], tuple[str, int | Fraction]] = {}
    listed: list[tuple[tuple[str | int, ...], Keep | None]] = [
        (("compressor",), compressor.keep if compressor else None)
    ]
    listed += [(("stages", index), stage.keep) for index, stage in enumerate(stages)]
    for spec_path, keep in listed:
        if keep is None or keep.auto or keep.of == "current":
            continue
        value = keep.count if keep.count is not None else cast("Fraction", keep.fraction)
        key = ("count" if keep.count is not None else "share", keep.per)
        before = seen.get(key)
        if before is not None and value > before[1]:
            raise Wrong(
                f"found {keep.model_dump()!r}, more than {before[0]} leaves; counts cannot grow. Keep fewer here "
                "or "
                "more there.",
                (*spec_path, "keep"),
            )
        seen[key] = (path(spec_path) if spec_path[0] == "stages" else "the compressor", value)


def check_budget(budget: Budget | None, compressor: CompressorSpec | None, stages: list[StageSpec]) -> None:
    """Refuse auto without what it is solved from, and a budget that the counts contradict at any depth."""
    keeps: list[tuple[tuple[str | int, ...], Keep | None]] = [
        (("stages", index, "keep"), stage.keep) for index, stage in enumerate(stages)
    ]
    if compressor is not None:
        keeps.insert(0, (("compressor", "keep"), compressor.keep))
    for spec_path, keep in keeps:
        if keep is None or not keep.auto:
            continue
        if budget is None:
            raise Wrong(
                "found auto without a budget; add for example `budget: {average: 64}`, or write a count or a share.",
                spec_path,
            )
        if compressor is not None and compressor.keep is None:
            raise Wrong(
                "found auto, but the compressor decides its own count, so nothing can be solved; give compressor.keep.",
                spec_path,
            )
        beside = next((other.per for _, other in keeps if other is not None and other.per != "image"), None)
        if beside is not None:
            raise Wrong(
                f"found auto beside `per: {beside}`; auto is solved for each image. Write a count or a share.",
                spec_path,
            )
    if budget is None:
        return
    if not stages and compressor is not None and compressor.keep is None:
        raise Wrong("the only reduction decides its own count, so the budget means nothing; remove it.", ("budget",))
    average = budget.average
    for spec_path, keep in keeps:
        if keep is None or keep.auto or keep.per != "image" or keep.of == "current":
            continue
        value = keep.fraction if budget.fraction is not None else keep.count
        limit = budget.fraction if budget.fraction is not None else average
        tolerance = Fraction(1, 1000) if budget.fraction is not None else 0.5
        last, first = spec_path == keeps[-1][0], spec_path[0] == "compressor"
        if value is None:
            continue
        low, high = value > limit + tolerance, value < limit - tolerance  # type: ignore[operator]  # both share or both count
        if (last and low) or (first and high):
            raise Wrong(
                f"an average of {average!r} contradicts {path(spec_path)}: {keep.model_dump()!r}, which leaves "
                f"{'more' if low else 'fewer'} in every layer; change one of them.",
                ("budget", "average"),
            )
