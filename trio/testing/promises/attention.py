"""Promise 5: attention implementations agree, and flash-attention's convention is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from trio.testing import varlen
from trio.testing.bench import RAGGED, Bench, attention_of, reduced
from trio.testing.results import Case, require


def cases(bench: Bench) -> Iterator[Case]:
    """Each implementation against the model's own, and the stand-in for flash-attention."""
    for name in bench.attention:
        yield name, partial(_agrees, bench, name)
    yield "flash-attention's convention", partial(_flash, bench)


def _flash(bench: Bench) -> str:
    with varlen.registered() as name:
        return _agrees(bench, name)


def _agrees(bench: Bench, name: str) -> str:
    inputs = bench.inputs(*RAGGED)
    pipeline = bench.pipeline()
    with pipeline:
        own = bench.forward(inputs)
        selection = reduced(pipeline.report).selection()
    with attention_of(bench.inner, name), pipeline:
        kept_full = bench.forward(inputs)
        found = pipeline.report.selection()
        out = bench.generate(inputs)
        recorded = pipeline.report.selection()
    share = bench.same_tokens(found, selection, name)
    with pipeline.replay(found):
        expected = bench.forward(inputs)
    error = bench.close(kept_full[:, -1], expected[:, -1], "prefill")
    require(own.shape[0] == kept_full.shape[0], "batch sizes differ")
    error = max(error, bench.follows_replay(pipeline, RAGGED, out, recorded))
    return f"{share:.0%} of the same tokens, prefill and {len(out.logits)} steps, largest error {error:.1e}"
