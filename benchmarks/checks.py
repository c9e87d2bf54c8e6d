"""What the checks cost that watch the runtime while it answers: steps with and without them, paired.

``python -m benchmarks.checks`` writes benchmarks/results/checks.json; ``python -m benchmarks.support`` puts it into
docs/support.md. The zoo's model is the worst case: its steps are so short that every line of Python shows.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import trio
from trio.core import upstream
from trio.core.upstream import Role, cache_of, keywords
from trio.runtime import hooks

OUT = Path(__file__).parent / "results" / "checks.json"
ROUNDS, STEPS = 40, 8


@contextmanager
def without_checks() -> Iterator[None]:
    """The runtime as it would be without them: caches and masks are taken as they come."""

    def meet(forward: Any, call: Any, given: Any) -> None:
        forward.cache = call.read(Role.CACHE, given)

    with (
        mock.patch.object(hooks.Runtime, "_verify", lambda self, forward: None),
        mock.patch.object(hooks.Runtime, "_meet_cache", staticmethod(meet)),
        mock.patch.object(hooks, "tokens_in", lambda cache, layers: cache.get_seq_length() if cache else 0),
        mock.patch.object(upstream.LayerCall, "check_mask", lambda self, given: None),
        mock.patch.object(upstream, "_check_shape", lambda mask, queries, keys: None),
    ):
        yield


def run(model: Any, inputs: Any) -> tuple[float, float]:
    """Seconds of a prefill, and of one decode step (the mean of `STEPS`)."""
    with torch.no_grad():
        begin = time.perf_counter()
        out = model(**inputs, **keywords({Role.USE_CACHE: True}))
        prefill, cache = time.perf_counter() - begin, cache_of(out)
        token = out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(STEPS):
            model(**keywords({Role.IDS: token, Role.CACHE: cache}))
    return prefill, (time.perf_counter() - begin) / STEPS


def measure() -> dict[str, Any]:
    """Medians of the ratios with over without, round by round, and their quartiles."""
    torch.set_num_threads(1)
    model, processor = trio.zoo.load("tiny-llava")
    from PIL import Image

    image = Image.effect_noise((168, 168), 80).convert("RGB")
    inputs = processor(images=image, text="<image> how many ?", return_tensors="pt")
    ratios: dict[str, list[float]] = {"prefill": [], "decode step": []}
    seconds: dict[str, list[float]] = {"prefill": [], "decode step": []}
    with trio.Pipeline.from_spec(trio.DEFAULT_SPEC, model):
        run(model, inputs)
        for number in range(ROUNDS):
            pair: dict[bool, tuple[float, float]] = {}
            for checked in (True, False) if number % 2 else (False, True):
                if checked:
                    pair[checked] = run(model, inputs)
                else:
                    with without_checks():
                        pair[checked] = run(model, inputs)
            for place, what in enumerate(ratios):
                ratios[what].append(pair[True][place] / pair[False][place])
                seconds[what].append(pair[True][place])
    quartiles = {what: statistics.quantiles(values, n=4) for what, values in ratios.items()}
    return {
        "command": "python -m benchmarks.checks",
        "model": "tiny-llava: 8 layers, width 160, 144 visual tokens, one image, float32",
        "spec": trio.DEFAULT_SPEC,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "transformers": upstream.version(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "milliseconds": {what: round(1000 * statistics.median(values), 2) for what, values in seconds.items()},
        "ratio": {what: [round(value, 4) for value in values] for what, values in quartiles.items()},
    }


def main() -> None:
    """Measures, and writes the file."""
    OUT.write_text(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
