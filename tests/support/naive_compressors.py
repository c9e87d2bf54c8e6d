"""The compressors once more, straight from their descriptions: loops, double precision, whole attention matrices.

Nothing here imports the package. Every function returns what is kept, in raster order, as `Kept`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Vector = list[float]


@dataclass
class Kept:
    """Places of the tokens kept (-1: the class token), their features, and the place that every token went to."""

    places: list[int]
    features: list[Vector]
    went: list[int | None]


class Tower:
    """Queries and keys of some blocks, drawn at random, and what can be read off their whole attention matrices."""

    def __init__(self, n: int, *, cls: bool, seed: int, heads: int = 4, dim: int = 4, blocks: int = 8, levels: int = 0):
        self.n, self.cls, self.heads, self.dim = n, cls, heads, dim
        generator = torch.Generator().manual_seed(seed)
        shape = (blocks, n + cls, heads, dim)
        self.queries = 1.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.keys = torch.randn(shape, generator=generator, dtype=torch.float64)
        if levels:  # a few kinds of patches: many ties; cosines of keys are exact in any order of summation
            kinds = torch.arange(n + cls) % levels
            self.queries, self.keys = self.queries[:, kinds], self.keys[:, kinds, :1].sign().expand_as(self.keys)

    def attention(self, block: int, *, one_head: bool = False) -> Vector:
        """By patch: the class token's row, or what each patch receives; mean over heads (and queries)."""
        queries, keys = self.queries[block], self.keys[block]
        if one_head:
            queries, keys = queries.flatten(1)[:, None], keys.flatten(1)[:, None]
        rows = []
        for head in range(queries.shape[1]):
            logits = queries[:, head] @ keys[:, head].T / math.sqrt(queries.shape[2])
            rows.append(logits.softmax(-1))  # the whole matrix of the head
        mean = torch.stack(rows).mean(0)
        return mean[0, 1:].tolist() if self.cls else mean.mean(0).tolist()

    def patch_keys(self, block: int) -> torch.Tensor:
        """``(n, heads, dim)``."""
        return self.keys[block, self.cls :]


def by_falling(values: Vector, among: list[int]) -> list[int]:
    return sorted(among, key=lambda i: (-round(values[i], 12), i))


def cosine(a: Vector, b: Vector) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return round(dot / lengths, 10) if lengths else 0.0


def mean(vectors: list[Vector]) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def plus(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def visionzip(tower: Tower, x: list[Vector], cls: Vector | None, dominant: int, contextual: int) -> Kept:
    n = len(x)
    saliency = tower.attention(-2)
    first = by_falling(saliency, list(range(n)))[: dominant - (cls is not None)]
    rest = [i for i in range(n) if i not in first]
    keys = [mean([head.tolist() for head in token]) for token in tower.patch_keys(-2)]
    targets: list[int] = []
    if contextual:
        targets = [rest[i] for i in range(0, len(rest), max(1, len(rest) // contextual))][:contextual]
    went: list[int | None] = [i if i in first or i in targets else None for i in range(n)]
    for i in rest:
        if targets and i not in targets:
            went[i] = max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))
    features = []
    for place in sorted(first + targets):
        others = [x[i] for i in range(n) if went[i] == place and i != place]
        features.append(plus(x[place], mean(others)) if others else x[place])
    before = [] if cls is None else [cls]
    return Kept([-1] * len(before) + sorted(first + targets), before + features, went)


def merge_into_nearest(x: list[Vector], kept: list[int]) -> Kept:
    went: list[int | None] = []
    for i in range(len(x)):
        went.append(i if i in kept else max(sorted(kept), key=lambda t: (cosine(x[i], x[t]), -t)))
    features = [mean([x[i] for i in range(len(x)) if went[i] == place]) for place in sorted(kept)]
    return Kept(sorted(kept), features, went)


def scan_by_top(tower: Tower, x: list[Vector], rows: int, columns: int, k: int, window: int) -> Kept:
    """Each window gives the same number; what is missing comes from the whole image."""
    down, across = max(1, rows // window), max(1, columns // window)
    shallow, deep = tower.attention(5), tower.attention(-2)
    local = []
    for r in range(down):
        for c in range(across):
            inside = [
                i
                for i in range(rows * columns)
                if min(i // columns // window, down - 1) == r and min(i % columns // window, across - 1) == c
            ]
            local += by_falling(shallow, inside)[: (k // 2) // (down * across)]
    others = [i for i in range(rows * columns) if i not in local]
    return merge_into_nearest(x, local + by_falling(deep, others)[: k - len(local)])


def scan_by_rank(tower: Tower, x: list[Vector], rows: int, columns: int, k: int, window: int) -> Kept:
    """The best first, as long as their windows have room."""
    down, across = max(1, rows // window), max(1, columns // window)
    shallow, deep = tower.attention(0), tower.attention(-1)
    room = math.ceil((k // 2) / (down * across))
    local: list[int] = []
    taken: dict[tuple[int, int], int] = {}
    for i in by_falling(shallow, list(range(rows * columns))):
        place = (min(i // columns // window, down - 1), min(i % columns // window, across - 1))
        if len(local) < k // 2 and taken.get(place, 0) < room:
            taken[place] = taken.get(place, 0) + 1
            local.append(i)
    others = [i for i in range(rows * columns) if i not in local]
    return merge_into_nearest(x, local + by_falling(deep, others)[: k - len(local)])


def dropped(x: list[Vector], kept: list[int]) -> Kept:
    return Kept(sorted(kept), [x[i] for i in sorted(kept)], [i if i in kept else None for i in range(len(x))])


def vispruner(tower: Tower, x: list[Vector], k: int) -> Kept:
    order = by_falling(tower.attention(-2), list(range(len(x))))
    important, rest = order[: k // 2], order[k // 2 :]
    diverse = k - k // 2
    while len(rest) > diverse:
        remove = min(8, len(rest) - diverse)
        a, b = rest[0::2], rest[1::2]
        likeness = {i: max(cosine(x[i], x[j]) for j in b) for i in a}
        a = sorted(a, key=lambda i: (-likeness[i], a.index(i)))[remove:]
        rest = a + b
    return dropped(x, important + rest)


def divprune(x: list[Vector], k: int) -> Kept:
    n = len(x)
    distance = [[1 - cosine(a, b) for b in x] for a in x]
    nearest = [min([distance[i][j] for j in range(n) if j != i], default=0.0) for i in range(n)]
    kept = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(kept) < k:
        left = [i for i in range(n) if i not in kept]
        kept.append(max(left, key=lambda i: (min(distance[i][j] for j in kept), -i)))
    return dropped(x, kept)


def prumerge(tower: Tower, x: list[Vector], *, plus_samples: bool, neighbours: int) -> Kept:
    n = len(x)
    attention = tower.attention(-1, one_head=True)
    ordered = sorted(attention)

    def quartile(share: float) -> float:
        at = share * (n - 1)
        below = math.floor(at)
        above = min(below + 1, n - 1)
        return ordered[below] + (at - below) * (ordered[above] - ordered[below])

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    ranked = by_falling(attention, list(range(n)))
    centres = ranked[: max(1, sum(value > bound for value in attention))]
    if plus_samples:
        step = max(1, n // len(centres) // 3)
        centres = sorted({*centres, *range(0, n - 1, step)})
    keys = [token.flatten().tolist() for token in tower.patch_keys(-1)]
    clusters = {}
    for c in centres:
        likeness = [cosine(keys[c], keys[i]) for i in range(n)]
        clusters[c] = by_falling(likeness, [i for i in range(n) if i != c])[:neighbours]
    others = [i for i in range(n) if i not in centres]
    features = {}
    for c in centres:
        features[c] = x[c]
        for i in clusters[c]:
            features[c] = plus(features[c], [attention[i] * value for value in x[i]])
    went: list[int | None] = [i if i in centres else None for i in range(n)]
    lead = by_falling(attention, others)[0] if others else None
    for i in others:
        near = [c for c in sorted(centres) if i in clusters[c]]
        went[i] = max(near, key=lambda c: (cosine(keys[c], keys[i]), -c)) if near else lead
    if lead is not None:
        went[lead] = lead
        features[lead] = [sum(attention[i] * x[i][d] for i in others) for d in range(len(x[0]))]
    return Kept(sorted(features), [features[c] for c in sorted(features)], went)
