"""Attention for packed training: one image as a prefix, short branches after it.

The same numbers as a block mask over the whole sequence would give, without computing the blocks that it hides: the
prefix is causal, and a branch token sees the prefix and, of the rest, only its own and the previous chunk, which is all
that its branch can reach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

CHUNK = 32
"""No branch may be longer than this."""
NAME = "trio-zoo-branches"


def local_mask(branch: Tensor) -> Tensor:
    """What tokens see in their own and the previous chunk, 0 or -inf: (batch, 1, tokens, 2 * CHUNK).

    Args:
        branch: (batch, tokens), the number of each token's branch; padding has a number of its own.
    """
    size, tokens = branch.shape
    chunks = branch.view(size, tokens // CHUNK, CHUNK)
    before = torch.cat([torch.full_like(chunks[:, :1], -2), chunks[:, :-1]], 1)
    keys = torch.cat([before, chunks], 2)
    order = torch.arange(CHUNK)[:, None] + CHUNK >= torch.arange(2 * CHUNK)
    seen = (keys[:, :, None, :] == chunks[:, :, :, None]) & order
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).view(size, 1, tokens, 2 * CHUNK)


def branch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """An attention function in the sense of transformers; ``attention_mask`` is what ``local_mask`` gives."""
    size, heads, total, width = query.shape
    tokens = attention_mask.shape[2]
    start = total - tokens
    head_out = F.scaled_dot_product_attention(
        query[:, :, :start], key[:, :, :start], value[:, :, :start], is_causal=True, scale=scaling
    )

    def windows(x: Tensor) -> Tensor:
        chunks = x[:, :, start:].reshape(size, heads, tokens // CHUNK, CHUNK, width)
        return torch.cat([F.pad(chunks[:, :, :-1], (0, 0, 0, 0, 1, 0)), chunks], 3)

    asked = query[:, :, start:] * scaling
    far = asked @ key[:, :, :start].transpose(-1, -2)
    near = asked.reshape(size, heads, tokens // CHUNK, CHUNK, width) @ windows(key).transpose(-1, -2)
    scores = torch.cat([far, near.reshape(size, heads, tokens, 2 * CHUNK) + attention_mask.to(near.dtype)], -1)
    weights = scores.float().softmax(-1).to(value.dtype)
    far_out = weights[..., :start] @ value[:, :, :start]
    near_out = weights[..., start:].reshape(size, heads, tokens // CHUNK, CHUNK, 2 * CHUNK) @ windows(value)
    out = torch.cat([head_out, far_out + near_out.reshape(size, heads, tokens, width)], 2)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, branch_attention)
