"""A guard around `generate` that refuses, by name and before anything runs, what cannot work with dropped tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from trio.errors import InputError
from trio.runtime.methods import StandIn


class GuardedGenerate(StandIn):
    """Stands in for a model's `generate` while a pipeline is attached; passes everything on unchanged."""

    def __init__(self, model: nn.Module, *, owner: object, name: str) -> None:
        """Prepares a guard.

        Args:
            model: the model whose `generate` is guarded.
            owner: who installs it.
            name: of the pipeline, for messages.
        """
        super().__init__(model, "generate")
        self.owner = owner
        self.name = name

    @staticmethod
    def on(model: nn.Module) -> GuardedGenerate | None:
        """The guard that stands on a model, if any."""
        there = vars(model).get("generate")
        return there if isinstance(there, GuardedGenerate) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the arguments, then generates."""
        config = kwargs.get("generation_config") or getattr(self._module, "generation_config", None)

        def asked(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        if kwargs.get("assistant_model") is not None or asked("prompt_lookup_num_tokens") is not None:
            raise InputError(
                "generate: assisted decoding appends guessed tokens to the prompt, so that its end cannot be found; "
                "leave out assistant_model and prompt_lookup_num_tokens, or detach the pipeline"
            )
        if asked("prefill_chunk_size") is not None:
            raise InputError(
                "generate: a chunked prefill hides the end of the prompt from the scorer; leave out "
                "prefill_chunk_size, or detach the pipeline"
            )
        cache = asked("cache_implementation")
        if cache is not None and cache not in ("dynamic", "dynamic_full", "offloaded"):
            raise InputError(
                f"generate: cache_implementation {cache!r} cannot hold a different number of tokens in each layer; "
                "use 'dynamic' (the default) or 'offloaded', or detach the pipeline"
            )
        return super().__call__(*args, **kwargs)
