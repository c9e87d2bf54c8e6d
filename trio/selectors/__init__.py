"""Selectors: from saliencies and features to the indices to keep, one method a file."""

from . import nms, soft_nms, top_k

__all__ = ["nms", "soft_nms", "top_k"]
