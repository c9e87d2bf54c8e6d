"""Adapters: one family of models a file."""

from . import generic, internvl, llava, llava_next, llava_onevision, qwen_vl
from .find import adapter_for, families

__all__ = ["adapter_for", "families", "generic", "internvl", "llava", "llava_next", "llava_onevision", "qwen_vl"]
