"""Promise 5: attention implementations agree, and flash-attention's convention is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .. import varlen
from ..bench import ONE, RAGGED, Bench, attention_of, kept_by_all, reduced, relative
from ..results import Case, require


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
    stock = bench.forward(inputs)
    with pipeline:
        bench.forward(inputs)
        selection, kept = reduced(pipeline.report).selection(), kept_by_all(pipeline.report)
        with pipeline.replay(selection):
            own = bench.forward(inputs)
    # In half precision the tower alone moves the tokens; what is promised is about the layers that we touch.
    where = bench.inner if bench.exact else bench.adapter.language_model
    with attention_of(where, name):
        try:
            noise = relative(bench.forward(inputs)[:, -1], stock[:, -1])
            bench.forward(bench.inputs(ONE))
        except Exception as failed:  # a stock model that cannot run on this implementation
            return f"not promised: the stock model itself fails on it ({failed})"
        with pipeline:
            bench.forward(inputs)
            found = kept_by_all(pipeline.report)
            with pipeline.replay(selection):
                other = bench.forward(inputs)
            out = bench.generate(inputs)
            error = bench.follows_replay(pipeline, RAGGED, out, pipeline.report.selection())
    share = bench.same_tokens(found, kept, name)
    difference = relative(other[:, -1], own[:, -1])
    allowed = max(bench.tolerance, 2 * noise)
    require(difference <= allowed, f"logits differ by {difference:.1e}, the stock model's by {noise:.1e}")
    return (
        f"{share:.0%} of the same tokens, logits differ by {difference:.1e} (stock {noise:.1e}), "
        f"{len(out.logits)} decoded steps within {error:.1e}"
    )
