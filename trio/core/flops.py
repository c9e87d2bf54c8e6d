"""Formulas that a model's parts and the methods on it share: floating-point operations in closed form.

Conventions. One multiply-add is 2 FLOPs. Matrix products and convolutions are counted, nothing else (no norms, softmax,
activations, rotations, biases, look-ups, sampling): what `torch.utils.flop_counter.FlopCounterMode` counts, so that the
two can be compared. All arguments are counts of rows; all results are whole numbers of FLOPs.
"""

from __future__ import annotations

from .shape import ModelShape

__all__ = [
    "attend",
    "blocked_flops",
    "feature_width",
    "head_flops",
    "keys_flops",
    "last_row_flops",
    "probe_flops",
    "product",
    "projector_flops",
    "reprojected_flops",
    "rows_flops",
    "similarity_flops",
    "sums_are_cheaper",
]


def product(rows: int, inputs: int, outputs: int) -> int:
    """A matrix product."""
    return 2 * rows * inputs * outputs


def attend(pairs: int, width: int) -> int:
    """QK^T and AV for `pairs` (query, key) pairs of `width` = heads * head_dim numbers."""
    return 4 * pairs * width


def projector_flops(shape: ModelShape, tokens: int) -> int:
    """The projector (or Qwen's merger) on `tokens` visual tokens."""
    return sum(product(tokens, inputs, outputs) for inputs, outputs in shape.projector)


def feature_width(shape: ModelShape) -> int:
    """Width of features in a compressor's space "tower"; the decoder's where the projector mixes patches."""
    return shape.projector[0][0] if _apart(shape) and shape.projector else shape.hidden


def reprojected_flops(shape: ModelShape, tokens: int) -> int:
    """The projector on tokens that a compressor made; 0 where it mixes patches, so that it runs before."""
    return projector_flops(shape, tokens) if _apart(shape) else 0


def _apart(shape: ModelShape) -> bool:
    """Whether the projector takes each patch by itself, so that features can be changed in front of it."""
    tower = shape.tower
    if tower is None or tower.patches_per_token > 1:
        return False
    return tower.crop_tokens is None or tower.crop_patches is None or tower.crop_tokens >= tower.crop_patches


def rows_flops(shape: ModelShape, rows: int) -> int:
    """One decoder layer's matrices other than keys and values, on `rows` rows: q, o, gate, up, down."""
    width = shape.heads * shape.head_dim
    return 2 * product(rows, shape.hidden, width) + 3 * product(rows, shape.hidden, shape.intermediate)


def keys_flops(shape: ModelShape, rows: int) -> int:
    """The key projection of one decoder layer on `rows` rows; the value projection costs the same."""
    return product(rows, shape.hidden, shape.kv_heads * shape.head_dim)


def head_flops(shape: ModelShape, rows: int) -> int:
    """The output head on `rows` rows."""
    return product(rows, shape.hidden, shape.vocab)


def probe_flops(shape: ModelShape, tokens: int, rows: int) -> int:
    """A saliency by gradients: `tokens` rows, `rows` supervised output rows of one layer, forward and backward.

    Keys are projected for all tokens, values for all tokens or for the weighted sums of them that the rows read,
    whichever is cheaper; queries, attention, feed-forward layer and head run on `rows` rows. Gradients are of inputs
    only, so the backward pass of a matrix costs its forward pass, and that of attention twice its forward.

    Args:
        shape: the model.
        tokens: rows that enter the layer, text and visual.
        rows: supervised rows K.
    """
    sums, values = shape.heads * rows, shape.kv_heads * shape.head_dim
    matrices = keys_flops(shape, tokens) + rows_flops(shape, rows) + head_flops(shape, rows)
    scores = product(sums, shape.head_dim, tokens)
    if sums_are_cheaper(sums, tokens, shape.hidden, values, shape.head_dim):
        return 2 * (matrices + product(sums, shape.hidden, values)) + 3 * (scores + product(sums, tokens, shape.hidden))
    return 2 * (matrices + keys_flops(shape, tokens)) + 3 * (scores + product(sums, tokens, shape.head_dim))


def sums_are_cheaper(sums: int, tokens: int, hidden: int, values: int, head_dim: int) -> bool:
    """Whether projecting weighted sums of hidden states to values costs less than summing the values of all tokens.

    Args:
        sums: weighted sums, heads times rows.
        tokens: tokens that enter the layer.
        hidden: features of a hidden state.
        values: features of all values of a token, key-value heads times head size.
        head_dim: features of a head.
    """
    first = product(sums, tokens, hidden) + product(sums, hidden, values)
    return first < product(tokens, hidden, values) + product(sums, tokens, head_dim)


def last_row_flops(shape: ModelShape, tokens: int) -> int:
    """The attention of one row to `tokens` keys: its query, all keys, one row of scores."""
    width = shape.heads * shape.head_dim
    return keys_flops(shape, tokens) + product(1, shape.hidden, width) + product(tokens, 1, width)


def similarity_flops(shape: ModelShape, rows: int, columns: int) -> int:
    """Similarities of the hidden states of `rows` tokens with those of `columns` tokens."""
    return product(rows, shape.hidden, columns)


def blocked_flops(shape: ModelShape, keep: int, tokens: int, *, block: int, rounds: int) -> int:
    """Similarities of a greedy selection in blocks: of the kept tokens with all, and inside a block a round.

    The number of rounds depends on the features, so that this is an estimate; where all tokens fit into one block it is
    exact.
    """
    if tokens <= block:
        return similarity_flops(shape, tokens, tokens)
    return similarity_flops(shape, keep, tokens) + rounds * similarity_flops(shape, block, block)
