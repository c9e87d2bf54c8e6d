"""The plugin for vLLM: ``vllm serve MODEL --hf-overrides '{"trio": "divprune-64"}'``.

vLLM finds it through the entry point ``trio`` in the group ``vllm.general_plugins``, and calls `register` in each of
its processes; ``docs/vllm.md`` has the commands. Nothing of vLLM is imported before vLLM asks.
"""

from __future__ import annotations

__all__ = ["register"]

#: Versions of vLLM that the plugin was tested with: from, and below.
TESTED = ((0, 32), (0, 33))
#: Architectures of vLLM, and the classes of this package in their places.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava:TrioLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "llava:TrioLlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": "qwen_vl:TrioQwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl:TrioQwen2_5VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "qwen_vl:TrioQwen3VLForConditionalGeneration",
}


def register() -> None:
    """Puts the package's models in place of vLLM's own; without a spec they do what vLLM's own do.

    In a version of vLLM that was not tested, or that lacks a seam, nothing is put in place: an engine that is started
    with a spec is refused with the reason.
    """
    from vllm import ModelRegistry

    from .seams import guard, missing_seam, place_tokens

    reason = missing_seam()
    if reason is None:
        for architecture, place in ARCHITECTURES.items():
            ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        place_tokens()
    guard(tuple(ARCHITECTURES), reason)
