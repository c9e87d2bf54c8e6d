"""Never slower: does a spec win here, and if not, from which image, batch or budget on does it?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from statistics import median

from ...errors import TrioError
from ...pipeline import Pipeline
from ...spec import PipelineSpec, load_spec
from .report import BenchRow, SpeedVerdict
from .timing import TimedWay, rounds
from .ways import Maker

__all__ = ["verdict"]

BATCHES = (2, 4, 8, 16)
#: Shares of the tokens kept on average that are tried as smaller budgets.
BUDGETS = ("33.3%", "22.2%", "11.1%", "5.6%")
_PAIRS, _SECONDS = 3, 30.0


def verdict(spec: PipelineSpec, rows: Sequence[BenchRow], maker: Maker, *, search: bool) -> SpeedVerdict:
    """Judges a spec by its row, and looks further where it loses.

    Args:
        spec: the spec.
        rows: that were measured.
        maker: of their ways.
        search: whether to look further.
    """
    row = next(row for row in rows if row.kind == "spec" and row.spec == spec.name)
    if row.speedup is None or row.speedup.value > 1 or not search:
        return SpeedVerdict(spec=spec.name, faster=row.speedup is not None and row.speedup.value > 1)
    tried = {
        "batch": _first((f"{samples}", spec, _more(maker, samples)) for samples in BATCHES if samples > maker.samples),
        "budget": _first((share, smaller, maker) for share, smaller in _budgets(spec, row)),
        "image": _first((size, spec, larger) for size, larger in _larger(maker)),
    }
    found = {what: next((value for value, speedup in values if speedup > 1), None) for what, values in tried.items()}
    return SpeedVerdict(spec=spec.name, faster=False, smallest=found, tried=tried)


def _more(maker: Maker, samples: int) -> Maker:
    return Maker(maker.adapter, maker.prompts, samples=samples, steps=0, shape=None)


def _budgets(spec: PipelineSpec, row: BenchRow) -> Iterable[tuple[str, PipelineSpec]]:
    """The spec with smaller budgets, where it states one as a share."""
    if spec.budget is None or not any(stage.keep.auto for stage in spec.stages):
        return
    for share in BUDGETS:
        if float(share.rstrip("%")) / 100 * row.visual_tokens < row.average_kept - 1:
            fields = {**spec.to_dict(), "name": f"{spec.name} at {share}", "budget": {"average": share}}
            yield share, load_spec(fields)


def _larger(maker: Maker) -> Iterable[tuple[str, Maker]]:
    """Larger images than the one measured, where the model takes some, smallest first."""
    for size in maker.prompts.larger:
        if maker.prompts.visual(size) > maker.visual:
            yield (
                f"{size[0]}x{size[1]}",
                Maker(maker.adapter, maker.prompts, samples=maker.samples, steps=0, shape=None, size=size),
            )


def _first(cases: Iterable[tuple[str, PipelineSpec, Maker]]) -> list[tuple[str, float]]:
    """Speed-ups case by case, up to the first that wins."""
    found: list[tuple[str, float]] = []
    for name, spec, maker in cases:
        try:
            found.append((name, speedup(spec, maker)))
        except (TrioError, MemoryError, RuntimeError):  # no room for a larger batch, or the budget cannot be met
            break
        if found[-1][1] > 1:
            break
    return found


def speedup(spec: PipelineSpec, maker: Maker) -> float:
    """Seconds of the full prefill / of the compressed one, the median of a few pairs.

    Args:
        spec: what is attached.
        maker: of the batch.
    """
    model = maker.adapter.model
    pipeline = Pipeline.from_spec(spec, model, adapter=maker.adapter)
    inputs, _ = maker.inputs_of(spec)
    ways = [TimedWay("full", maker.inputs, nullcontext, 0), TimedWay("spec", inputs, lambda: pipeline, 0)]
    found = rounds(model, ways, least=1, most=_PAIRS, seconds=_SECONDS)
    return median(one.prefill / other.prefill for one, other in zip(found["full"], found["spec"], strict=True))
