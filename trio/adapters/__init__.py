"""Adapters: one family of models a file."""

from . import generic, internvl, llava, llava_next, llava_onevision, qwen_vl
from .find import adapter_for

__all__ = ["adapter_for", "generic", "internvl", "llava", "llava_next", "llava_onevision", "qwen_vl"]
