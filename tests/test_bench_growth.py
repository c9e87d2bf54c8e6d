"""No part costs more than O(kN) in time or O(N) in memory, beyond a block: on counted operators, not by the clock.

But for three methods that compare all pairs of tokens by their definition: theirs is O(N^2) in time.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.counting import count
from benchmarks.growth import cases, exponent

PARTS = cases()
SIZES = (1024, 2048, 4096)
#: Methods whose definition compares all pairs, and why; their work grows with N squared, their memory with N.
ALL_PAIRS = {
    ("compressor", "divprune"): "the first token is the one whose nearest other token is farthest",
    ("compressor", "tome"): "every token of one half is paired with the most similar one of the other half",
    ("compressor", "vispruner"): "every token of one half goes by the most similar one of the other half",
}
#: What rounding, sorting and constant parts may add to an exponent.
SLACK = 0.1


def test_the_counter_sees_work_memory_and_no_views():
    left, right = torch.ones(8, 4), torch.ones(4, 2)
    found = count(lambda: ((left @ right).view(2, 8) + 1).sum())
    assert (found.launches, found.work, found.largest) == (3, 2 * 8 * 4 * 2 + 16 + 1, 64)


def test_exponents_are_those_of_powers():
    assert exponent((10, 100, 1000), (5.0, 500.0, 50_000.0)) == pytest.approx(2.0)


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_cost_grows_no_faster_than_the_number_of_tokens(part):
    work = 2.0 if part in ALL_PAIRS else 1.0
    found = [count(PARTS[part](tokens, 32, 1)) for tokens in SIZES]
    assert exponent(SIZES, [one.work for one in found]) <= work + SLACK
    assert exponent(SIZES, [one.largest for one in found]) <= 1.0 + SLACK


@pytest.mark.parametrize("part", [part for part in PARTS if part[0] == "selector"], ids=" ".join)
def test_cost_grows_no_faster_than_the_number_kept(part):
    counts = (32, 64, 128)
    found = [count(PARTS[part](1024, keep, 1)) for keep in counts]
    assert exponent(counts, [one.work for one in found]) <= 1.0 + SLACK
