"""Patches of a model's methods while a pipeline is attached: encoders are noted, `generate` is guarded."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from ..core import upstream
from ..core.hooking import MethodPatch, Owner, patches_on
from ..errors import InputError


class Listener(Protocol):
    """Who is told of the methods' calls: the runtime."""

    within_encoder: bool

    def encoding(self, modality: str, arguments: Mapping[str, Any]) -> None:
        """An encoder method is about to run."""

    def encoded(self, modality: str, counts: tuple[int, ...] | None) -> None:
        """It has run; `counts` are the feature rows of each image, None where that cannot be told."""

    def generating(self, guard: MethodPatch, *, appends: bool) -> AbstractContextManager[None]:
        """`generate` runs in the block; `appends`: each of its steps adds tokens that are no padding."""


class NotedEncoder(MethodPatch):
    """Notes the arguments of an encoder method: `generate` may call it before the forward, which then sees no grids."""

    def __init__(
        self, module: nn.Module, name: str, *, modality: str, pixels: tuple[str, ...], listener: Listener, owner: Owner
    ) -> None:
        """Prepares the patch.

        Args:
            module: the module that owns the method.
            name: of the method.
            modality: what it encodes.
            pixels: arguments that are noted by their shape alone, so that no image is kept alive.
            listener: told of each call; held weakly.
            owner: whose patch it is.
        """
        super().__init__(module, name, owner=owner)
        self._modality = modality
        self._pixels = pixels
        self._listener = weakref.ref(listener)
        self._signature = inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Notes the arguments, encodes, then tells how many features each image has."""
        listener = self._listener()
        # Some encoders of videos call that of images: only the outer call is the model's own.
        if listener is None or not self.owner.attached or listener.within_encoder:
            return super().__call__(*args, **kwargs)
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        listener.encoding(
            self._modality,
            {
                name: getattr(value, "shape", None) if name in self._pixels else value
                for name, value in given.items()
                if value is not None
            },
        )
        listener.within_encoder = True
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            listener.within_encoder = False
        listener.encoded(self._modality, upstream.feature_counts(out))
        return out


class GuardedGenerate(MethodPatch):
    """Refuses, by name and before anything runs, the ways of generating that cannot work with dropped tokens."""

    def __init__(self, model: nn.Module, *, listener: Listener, owner: Owner) -> None:
        """Prepares the guard of a model's `generate`."""
        super().__init__(model, "generate", owner=owner)
        self._listener = weakref.ref(listener)

    @staticmethod
    def owner_on(model: nn.Module) -> Owner | None:
        """Who is attached to a model, if anybody is."""
        guards = (patch for patch in patches_on(model) if isinstance(patch, GuardedGenerate))
        return next((guard.owner for guard in guards if guard.owner.attached), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the arguments, then generates."""
        listener = self._listener()
        if listener is None or not self.owner.attached:
            return super().__call__(*args, **kwargs)
        config = kwargs.get(upstream.CONFIGURATION) or getattr(self._module, upstream.CONFIGURATION, None)

        def setting(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        if kwargs.get(upstream.ASSISTANT) is not None or setting(upstream.LOOKUP) is not None:
            raise InputError(
                "generate: assisted decoding appends guessed tokens to the prompt, so that its end cannot be found; "
                f"leave out {upstream.ASSISTANT} and {upstream.LOOKUP}, or detach the pipeline"
            )
        if setting(upstream.CHUNK) is not None:
            raise InputError(
                "generate: a chunked prefill hides the end of the prompt from the scorer; leave out "
                f"{upstream.CHUNK}, or detach the pipeline"
            )
        cache = setting(upstream.CACHE_KIND)
        if cache is not None and cache not in upstream.RAGGED_CACHES:
            raise InputError(
                f"generate: {upstream.CACHE_KIND} {cache!r} cannot hold a different number of tokens in each layer; "
                "use 'dynamic' (the default) or 'offloaded', or detach the pipeline"
            )
        with listener.generating(self, appends=kwargs.get(upstream.CUSTOM_GENERATE) is None):
            return super().__call__(*args, **kwargs)
