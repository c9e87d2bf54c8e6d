"""The plugin for lmms-eval: ``lmms_eval --model trio --model_args pretrained=...,spec=... --tasks pope``.

lmms-eval finds it through the entry point ``trio`` in the group ``lmms_eval.models``; ``docs/lmms-eval.md`` has the
commands. Nothing of lmms-eval is imported before lmms-eval asks.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """What lmms-eval registers: the model ``trio``, as a chat model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="trio", chat_class_path=f"{__name__}.model.TrioModel")
