"""The bounds that this project sets itself for speed, judged on a benchmark's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .report import BenchRow, SpeedTarget

__all__ = ["judge"]

#: Over the oracle, beyond the counted share of scoring, selecting and compressing: on a processor.
BEYOND_SHARE = 0.03
#: Over the oracle on an accelerator, and for a batch of 8.
OVER_ORACLE, OVER_ORACLE_BATCH = 0.10, 0.05
#: Speed-up of the prefill / reduction of counted FLOPs, on a processor.
OF_REDUCTION = 0.85
#: A decode step over that of the untouched model with as long a cache; a prefill that keeps all over the stock one.
OVER_SHORT, OVER_STOCK = 0.03, 0.03


def judge(rows: Sequence[BenchRow], *, batch: int, accelerator: bool) -> list[SpeedTarget]:
    """The targets that can be judged on these rows.

    Args:
        rows: of one benchmark.
        batch: samples.
        accelerator: whether it ran on one.
    """
    full = next((row for row in rows if row.kind == "full"), None)
    oracles = {row.spec: row for row in rows if row.kind == "oracle"}
    found: list[SpeedTarget] = []
    for row in rows:
        if row.kind == "keep-all" and row.over_full is not None:
            found.append(_at_most("all kept, over the untouched model", row, row.over_full.value - 1, OVER_STOCK))
        if row.kind != "spec":
            continue
        found += _over_oracle(row, oracles.get(row.spec), batch=batch, accelerator=accelerator)
        if not accelerator and full is not None and full.flops and row.flops and row.speedup is not None:
            share = row.speedup.value / (full.flops / row.flops)
            found.append(
                SpeedTarget(
                    name="speed-up / reduction of FLOPs",
                    spec=row.spec,
                    bound=OF_REDUCTION,
                    found=share,
                    at_least=True,
                    held=share >= OF_REDUCTION,
                    note="" if share >= OF_REDUCTION else _where(row),
                )
            )
        if row.decode_over_short is not None:
            value = row.decode_over_short.value - 1
            held = value <= OVER_SHORT
            name = "decode step, over as short a cache"
            found.append(SpeedTarget(name=name, spec=row.spec, bound=OVER_SHORT, found=value, held=held))
    return found


def _over_oracle(row: BenchRow, oracle: BenchRow | None, *, batch: int, accelerator: bool) -> Iterator[SpeedTarget]:
    if row.over_oracle is None or oracle is None:
        return
    value = row.over_oracle.value - 1
    if batch >= 8:
        yield _at_most("batch, over the oracle's", row, value, OVER_ORACLE_BATCH)
    elif accelerator:
        yield _at_most("prefill, over the oracle's", row, value, OVER_ORACLE)
    elif oracle.flops and row.overhead_flops is not None:
        share = row.overhead_flops / oracle.flops
        yield _at_most("prefill, over the oracle's", row, value, share + BEYOND_SHARE)


def _at_most(name: str, row: BenchRow, value: float, bound: float) -> SpeedTarget:
    held = value <= bound
    return SpeedTarget(name=name, spec=row.spec, bound=bound, found=value, held=held, note="" if held else _where(row))


def _where(row: BenchRow) -> str:
    """Where the time of a prefill goes, largest first."""
    if not row.phases:
        return ""
    total = sum(row.phases.values())
    parts = sorted(row.phases.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts if seconds > 0.005 * total)
