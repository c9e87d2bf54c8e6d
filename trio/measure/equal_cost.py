"""What costs as much as a spec: a smaller image, or pooled tokens, on the model as it is, counted by formula.

The baseline of everything that drops tokens: a smaller image makes the vision tower cheaper, too. Where every image
has the same number of tokens, averaged ones stand in for it (`average-pool`), behind a tower that sees everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

from ..core.upstream import PatchProcessor
from ..cost import ModelShape, predict
from ..cost.flops import decode_flops, prefill_flops, projector_flops, tower_flops
from ..encoders.resizing import resized_size
from ..spec import PipelineSpec, load_spec

__all__ = [
    "SHARES",
    "AskedPrompt",
    "dearest",
    "equal_share",
    "is_baseline",
    "mean_cost",
    "nearest_size",
    "percent",
    "pool_count",
    "pooled_cost",
    "pooled_spec",
    "resized_tokens",
    "share_of",
    "whole_cost",
]

#: Shares of an image's visual tokens that are tried.
SHARES = tuple(step / 200 for step in range(1, 201))
Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class AskedPrompt:
    """What the cost of an answer depends on.

    Attributes:
        tokens: visual tokens of the images as the full model has them.
        text: the other tokens of the prompt.
        new: tokens of the answer; the first comes out of the prefill.
        size: width and height of the image in pixels, where it is resized.
    """

    tokens: int
    text: int
    new: int
    size: tuple[int, int] = (0, 0)


def whole_cost(shape: ModelShape, visual: int, text: int, new: int) -> int:
    """FLOPs of an answer of the model as it is: tower, projector, prefill and decoding.

    Args:
        shape: of the model.
        visual: visual tokens of the image.
        text: the other tokens of the prompt.
        new: tokens of the answer.
    """
    rows = [text + visual] * shape.layers
    encoded = tower_flops(shape.tower, visual) + projector_flops(shape, visual)
    return encoded + prefill_flops(shape, rows) + decode_flops(shape, rows, max(0, new - 1))


def pooled_spec(keep: int | str, **fields: object) -> PipelineSpec:
    """Average pooling on the encoder side to a count, or to a share, of an image's tokens."""
    made = {"version": 1, "name": "average-pool", "compressor": {"name": "average-pool", "keep": keep}, **fields}
    return load_spec(made)


@lru_cache(maxsize=65536)
def pooled_cost(shape: ModelShape, keep: int | str, visual: int, text: int, new: int) -> int:
    """As `whole_cost`, with `pooled_spec`."""
    spec = pooled_spec(keep)
    return predict(spec, shape, images=(visual,), text_tokens=text, new_tokens=new).compressed.flops.total


@lru_cache(maxsize=65536)
def resized_tokens(patches: PatchProcessor, size: tuple[int, int], share: float) -> int:
    """Visual tokens of an image that is resized to a share of them."""
    small = resized_size(size, patches, share_of(share))
    return patches.tokens(size) if small is None else small[0] * small[1] // patches.unit**2


def share_of(share: float) -> Callable[[int], int]:
    """What an image is to have of so many tokens: one at least."""
    return lambda tokens: max(1, int(share * tokens + 0.5))


def mean_cost(prompts: Mapping[AskedPrompt, int], cost: Callable[[AskedPrompt], int]) -> float:
    """Mean FLOPs of an answer over prompts, each as often as `prompts` says."""
    return sum(times * cost(one) for one, times in prompts.items()) / sum(prompts.values())


def dearest(candidates: Iterable[Candidate], cost: Callable[[Candidate], float], most: float) -> Candidate | None:
    """The one that costs most of those that cost `most` or less; of several the first; None where all cost more."""
    found = [(cost(one), one) for one in candidates]
    fitting = [pair for pair in found if pair[0] <= most]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def equal_share(
    shape: ModelShape, patches: PatchProcessor | None, prompts: Mapping[AskedPrompt, int], most: float
) -> float | None:
    """The share of their visual tokens at which images cost nearest to `most` an answer, and not more.

    Args:
        shape: of the model.
        patches: its image processor, where tokens follow an image's size; None: tokens are pooled.
        prompts: what is asked, and how often.
        most: FLOPs of an answer.

    Returns:
        A share above 0 and up to 1; None where everything costs more.
    """
    typical = round(sum(one.tokens * times for one, times in prompts.items()) / sum(prompts.values()))
    shares = SHARES if patches is not None else [count / typical for count in range(1, typical + 1)]

    def cost(share: float, one: AskedPrompt) -> int:
        if patches is not None:
            return whole_cost(shape, resized_tokens(patches, one.size, share), one.text, one.new)
        return pooled_cost(shape, percent(share), one.tokens, one.text, one.new)

    return dearest(shares, lambda share: mean_cost(prompts, partial(cost, share)), most)


def percent(share: float) -> str:
    """A share as specs write it."""
    return f"{100 * share:.4f}%"


def is_baseline(spec: PipelineSpec) -> bool:
    """Whether a spec only resizes, or only pools: it is what others are compared with."""
    pooled = spec.compressor is not None and spec.compressor.name == "average-pool"
    return not spec.stages and (spec.compressor is None or pooled)


def pool_count(cost: Callable[[int], float], visual: int, most: float) -> int | None:
    """The largest count of pooled tokens that costs `most` or less, whose cost grows with it; None: each costs more.

    Args:
        cost: of a count.
        visual: tokens that there are.
        most: the cost that is not to be exceeded.
    """
    low, high, best = 1, visual, None
    while low <= high:
        middle = (low + high) // 2
        if cost(middle) <= most:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def nearest_size(sizes: Sequence[Candidate], cost: Callable[[Candidate], float], goal: float) -> Candidate:
    """The size whose cost is nearest to `goal`, above or below; of several the first."""
    return min(sizes, key=lambda one: abs(cost(one) - goal))
