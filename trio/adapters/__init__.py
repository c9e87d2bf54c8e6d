"""Adapters: one family of models a file, found by the registry `trio.ADAPTERS` at the first look-up."""

from .find import adapter_for, families

__all__ = ["adapter_for", "families"]
