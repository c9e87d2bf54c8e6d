"""Adapters: one family of models a file."""

from trio.adapters import internvl, llava, llava_next, llava_onevision, qwen_vl
from trio.adapters.find import adapter_for

__all__ = ["adapter_for", "internvl", "llava", "llava_next", "llava_onevision", "qwen_vl"]
