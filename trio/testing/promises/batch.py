"""Promise 4: a padded batch keeps for each sample exactly the tokens that it keeps alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ...core.prompts import Prompt, Side
from ..bench import RAGGED, Bench, Selection, Setting, kept_by_all
from ..results import Case


def cases(bench: Bench) -> Iterator[Case]:
    """Every setting, padded on either side: one, two and no images, and an image at the very end."""
    for setting in bench.settings:
        for side in ("left", "right"):
            yield f"{setting.label}, padded on the {side}", partial(singles, bench, setting, side)


def singles(bench: Bench, setting: Setting, side: Side, prompts: Sequence[Prompt] = RAGGED) -> str:
    """Runs a batch and each of its samples alone; some prompt has an image."""
    inputs = bench.inputs(*prompts, side=side)
    pipeline = bench.pipeline(setting)
    worst = 0.0
    alone_kept: Selection = [[] for _ in range(1 + len(setting.stages))]
    batch_kept: Selection = [[] for _ in range(1 + len(setting.stages))]
    with pipeline:
        logits = bench.forward(inputs)
        report = pipeline.report
        ends = bench.last(logits, inputs, side, report)
        selection, kept = report.selection(), kept_by_all(report)
        for sample, prompt in enumerate(prompts):
            alone = bench.inputs(prompt)
            expected = [[by_sample[sample]] for by_sample in selection]
            if prompt.images:
                bench.forward(alone)
                for place, by_sample in enumerate(kept_by_all(pipeline.report)):
                    alone_kept[place] += by_sample
                    batch_kept[place].append(kept[place][sample])
            # Half precision may break a tie differently: logits are compared for the same tokens.
            with pipeline.replay(expected):
                own = bench.forward(alone)[:, -1]
            worst = max(worst, bench.close(ends[sample : sample + 1], own, f"sample {sample}"))
    share = bench.same_tokens(alone_kept, batch_kept, "samples alone")
    return f"{share:.1%} of the same tokens, kept {report.retention:.1%}, largest error {worst:.1e}"
