"""Adapters: one family of models a file."""

from trio.adapters import llava
from trio.adapters.find import adapter_for

__all__ = ["adapter_for", "llava"]
