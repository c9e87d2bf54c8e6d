"""Selectors: from saliencies and features to the indices to keep, one method a file."""

from trio.selectors import nms, top_k

__all__ = ["nms", "top_k"]
