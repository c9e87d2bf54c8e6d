"""Promise 4: a padded batch keeps for each sample exactly the tokens that it keeps alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from trio.testing.bench import RAGGED, Bench, Setting, reduced
from trio.testing.inputs import Side
from trio.testing.results import Case


def cases(bench: Bench) -> Iterator[Case]:
    """Every setting, padded on either side: one, two and no pictures, and a picture at the very end."""
    for setting in bench.settings:
        for side in ("left", "right"):
            yield f"{setting.label}, padded on the {side}", partial(_singles, bench, setting, side)


def _singles(bench: Bench, setting: Setting, side: Side) -> str:
    inputs = bench.inputs(*RAGGED, side=side)
    pipeline = bench.pipeline(setting)
    worst, shares = 0.0, []
    with pipeline:
        logits = bench.forward(inputs)
        report = reduced(pipeline.report)
        ends = bench.last(logits, inputs, side, report)
        selection = report.selection()
        for sample, prompt in enumerate(RAGGED):
            alone = bench.inputs(prompt)
            expected = [[by_sample[sample]] for by_sample in selection]
            if prompt.pictures:
                bench.forward(alone)
                found = pipeline.report.selection()
                shares.append(bench.same_tokens(found, expected, f"sample {sample} alone"))
            # Half precision may break a tie differently: logits are compared for the same tokens.
            with pipeline.replay(expected):
                own = bench.forward(alone)[:, -1]
            worst = max(worst, bench.close(ends[sample : sample + 1], own, f"sample {sample}"))
    return f"{min(shares):.0%} of the same tokens, largest error {worst:.1e}"
