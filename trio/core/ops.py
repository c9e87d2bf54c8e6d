"""What selectors share."""

from __future__ import annotations

import torch

from .transfer import upload


def first_k(order: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of each row of a ranking, back in raster order.

    Args:
        order: int64 ``(G, N)``, token indices from best to worst.
        k: int64 ``(G,)`` on the CPU.

    Returns:
        Indices ``(G, K)`` in rising order, K the largest k, and bool ``(G, K)``, True at the first k of each group.
    """
    most = int(k.max()) if k.numel() else 0
    valid = torch.arange(most, device=order.device)[None] < upload(k, order.device)[:, None]
    beyond = order.shape[1]
    indices = order[:, :most].masked_fill(~valid, beyond).sort(dim=1).values
    return indices.clamp_max(max(beyond - 1, 0)), valid


def ranking(saliency: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Token indices ``(G, N)`` by falling saliency, ties to the lower index, tokens that are not valid last."""
    by_saliency = saliency.masked_fill(~valid, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    # A valid token may itself score -inf: it still comes before the ones that do not exist.
    late = (~valid).gather(1, by_saliency).to(torch.int8).sort(dim=1, stable=True).indices
    return by_saliency.gather(1, late)


def take_rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Chosen rows of ``(G, N, D)`` by int64 ``(G, m)``: ``(G, m, D)``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Features ``(..., D)`` at length 1, float32; zeros stay zeros, huge and tiny ones neither overflow nor vanish."""
    features = features.float()
    largest: torch.Tensor = torch.linalg.vector_norm(features, float("inf"), dim=-1, keepdim=True)
    unit = features / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return unit.div_(torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(1e-12))
