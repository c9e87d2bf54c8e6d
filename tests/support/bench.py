"""A bench of the conformance suite on the tests' tiny models."""

from __future__ import annotations

from typing import Any

from trio.adapters import adapter_for
from trio.testing import TokenInputs
from trio.testing.adapters import TOLERANCES
from trio.testing.bench import TWO_STAGES, Bench, Setting

#: Fits every tiny model of `support.models`.
TOKENS = TokenInputs()


def bench(model: Any, *settings: Setting) -> Bench:
    adapter = adapter_for(model)
    dtype = adapter.model.dtype
    return Bench(
        model=model,
        factory=TOKENS,
        adapter=adapter,
        tolerance=TOLERANCES[dtype],
        exact=dtype.itemsize >= 4,
        settings=settings or (Setting("two stages", TWO_STAGES),),
        attention=("eager", "sdpa"),
    )
