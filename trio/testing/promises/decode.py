"""Promise 3: every decoded step equals one uncached pass that replays the recorded indices layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ...core.prompts import Prompt
from ..bench import ONE, RAGGED, TWO, Bench, Setting
from ..results import Case


def cases(bench: Bench) -> Iterator[Case]:
    """Every setting, for one image, for two, and for a ragged batch."""
    for setting in bench.settings:
        yield f"{setting.label}, one image", partial(decoded, bench, setting, (ONE,))
        yield f"{setting.label}, two images", partial(decoded, bench, setting, (TWO,))
        yield f"{setting.label}, ragged batch", partial(decoded, bench, setting, RAGGED)


def decoded(bench: Bench, setting: Setting, prompts: Sequence[Prompt]) -> str:
    """Generates for a batch, then runs each sequence at once."""
    pipeline = bench.pipeline(setting)
    with pipeline:
        out = bench.generate(bench.inputs(*prompts))
        report = pipeline.report
    error = bench.follows_replay(pipeline, prompts, out, report.selection())
    return f"{len(out.logits)} steps, kept {report.retention:.1%}, largest error {error:.1e}"
