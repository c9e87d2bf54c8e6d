"""What a tower computes, read off the shapes of its weights: for libraries whose models have no configuration."""

from __future__ import annotations

import math

from torch import nn

from ...core.shape import TowerShape
from .base import Tower


def shape_of_weights(
    tower: Tower, embedding: nn.Module, feed_forward: str, *, heads: int, patches: int | None
) -> TowerShape:
    """The shape of a tower of equal blocks; parameters on the device `meta` will do.

    Args:
        tower: bound to the module.
        embedding: the convolution that makes patches into rows.
        feed_forward: path of the feed-forward layer below a block.
        heads: attention heads of a block.
        patches: of each image; None where images have any size.

    Raises:
        UnsupportedModelError: blocks differ, an attention is not four square matrices, or a feed-forward layer is not
            two or three matrices of one width.
    """
    (kernel,) = (weight for weight in embedding.parameters() if weight.ndim == 4)
    width, values = kernel.shape[0], math.prod(kernel.shape[1:])
    layers = {
        (_matrices(tower.attention(block)), _matrices(tower.part(block, feed_forward)))
        for block in range(len(tower.blocks))
    }
    if len(layers) > 1:
        raise tower.refuse("its blocks differ in size, which the cost formulas do not describe")
    ((attention, forward),) = layers
    inner = forward[-1][1] if forward else 0
    matrices = sum(map(math.prod, forward)) / (width * inner) if inner else 0
    if sum(map(math.prod, attention)) != 4 * width**2 or matrices not in (2, 3):
        raise tower.refuse(
            f"its blocks have matrices {attention} in attention and {forward} behind it, where the cost formulas "
            f"describe four of {width} x {width} and two or three of one width"
        )
    return TowerShape(
        layers=len(tower.blocks),
        hidden=width,
        intermediate=inner,
        patch_values=values,
        cls_tokens=int(tower.has_cls),
        registers=tower.prefix - tower.has_cls,
        gated=matrices == 3,
        crop_patches=patches,
        heads=heads,
    )


def _matrices(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The shapes of a module's matrices, in the order in which it holds them."""
    return tuple(tuple(weight.shape) for weight in module.parameters() if weight.ndim == 2)
