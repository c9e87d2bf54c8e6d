"""A cache layer that holds fewer tokens than the conversation has, and knows which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..core.upstream import Cache, DynamicLayer, plain_length
from ..errors import CacheError

if TYPE_CHECKING:
    from .forward import Segment


class _WholeCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__ has no types
    """A layer of a cache that is cropped as a whole or not at all.

    A cache crops its layers one after another. The first one asks all of them before any is changed.

    Attributes:
        peers: all layers of the cache, where this is the first; else None.
    """

    peers: list[Any] | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens off the end.

        Raises:
            CacheError: some of them came before the last reduction, in this layer or in one behind it.
        """
        reduced = [layer for layer in self.peers or () if isinstance(layer, ReducedLayer)]
        for layer in reduced:
            layer.check_crop(tokens_to_remove)
        if tokens_to_remove > 0 and reduced:  # newer releases take a number to remove only
            tokens_to_remove = -max(reduced[0].outer - tokens_to_remove, 0)
        if tokens_to_remove:
            super().crop(tokens_to_remove)


class FirstLayer(_WholeCacheLayer):
    """The first layer of a cache whose later layers are reduced; it holds every token, as a `DynamicLayer` does."""

    @classmethod
    def of(cls, layer: DynamicLayer, peers: list[Any]) -> FirstLayer:
        """A plain layer with what it holds, as the first of `peers`."""
        first = cls()  # type: ignore[no-untyped-call]  # transformers gives no types
        vars(first).update(vars(layer))
        first.peers = peers
        return first


class ReducedLayer(_WholeCacheLayer):
    """The cache of a decoder layer behind a stage.

    It replaces a `DynamicLayer` within the cache, so that all that transformers does with caches works on it:
    reordering for beams, cropping, copying, offloading. `get_seq_length` gives the tokens of the conversation, as
    generation and position ids want it; `get_mask_sizes` the keys that are really there, as masks want it.

    While answers are decoded, only keys, values and `valid` change: numbers that changed would make torch.compile trace
    every step anew.

    Attributes:
        pipeline_name: which pipeline reduced it; another one must not go on with it.
        valid: bool ``(B, n)`` for the first n keys, False at padding; keys behind are none. None: no key is padding.
        dropped: int64 ``(B,)``, visual tokens dropped so far in each sample; None before the first.
        missing: columns of the conversation for which no key is here.
        reduced_at: tokens of the conversation at the last reduction; only those behind can be cropped.
        mask_ahead: the mask of a query behind many more keys, of which decoding steps take the first columns.
    """

    def __init__(self, pipeline_name: str) -> None:
        """An empty layer."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers gives no types
        self.pipeline_name = pipeline_name
        self.valid: torch.Tensor | None = None
        self.dropped: torch.Tensor | None = None
        self.missing = 0
        self.reduced_at = 0
        self.mask_ahead: torch.Tensor | None = None
        self._announced: Segment | None = None

    def announce(self, segment: Segment) -> None:
        """What the next `update` will bring; only the attached pipeline knows it."""
        self._announced = segment

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values.

        Raises:
            CacheError: no pipeline announced them, so nobody has built the masks and positions that they need; or
                another number than the announced one came.
        """
        if self._announced is None:
            raise CacheError(
                f"cache: it was compressed by the pipeline {self.pipeline_name!r}, which is not attached any more; "
                "attach that pipeline to go on with this conversation, or start one with a fresh cache"
            )
        coming, self._announced = self._announced, None
        if self.held + key_states.shape[-2] != coming.keys:
            raise CacheError(
                f"cache: the layer holds {self.held} keys and was given {key_states.shape[-2]}, but {coming.keys} "
                "in all were planned, so masks and positions would not fit: report this with what `trio doctor` prints"
            )
        outer = self.outer + coming.tokens
        keys, values = super().update(key_states, value_states)
        self.valid, self.dropped, self.mask_ahead = coming.valid, coming.dropped, coming.mask_ahead
        if coming.reduced:
            self.missing, self.reduced_at = outer - coming.keys, outer
        return keys, values

    @property
    def outer(self) -> int:
        """Tokens of the conversation so far, padding included."""
        return self.held + self.missing

    @property
    def tail(self) -> int:
        """Tokens at the end that came after the last reduction."""
        return self.outer - self.reduced_at

    @property
    def held(self) -> int:
        """Keys that are really there."""
        return 0 if not self.is_initialized or self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        """Tokens of the conversation so far, the dropped ones included."""
        return self.outer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that attention will see."""
        return self.held + query_length, 0

    @property
    def pending(self) -> bool:
        """Whether keys and values were announced that never came."""
        return self._announced is not None

    def _removed(self, tokens: int) -> int:
        """How many tokens a call of `crop` takes off: a number below 0, or what is to be left."""
        return abs(tokens) if tokens <= 0 else max(self.outer - tokens, 0)

    def check_crop(self, tokens: int) -> None:
        """Refuses a crop that would need tokens back which came before the last reduction.

        Raises:
            CacheError: naming how many can be taken off.
        """
        remove = self._removed(tokens)
        if remove > self.tail:
            raise CacheError(
                f"cache: asked to take {remove} tokens off the end, but only the last {self.tail} came after visual "
                "tokens were dropped; crop fewer, or start again with a fresh cache"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens off the end.

        Raises:
            CacheError: some of them came before the last reduction.
        """
        remove = self._removed(tokens_to_remove)
        if remove == 0:
            return
        self.check_crop(tokens_to_remove)
        super().crop(-remove)
        if self.valid is not None:
            self.valid = self.valid[:, : self.held]
        self.mask_ahead = None

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.valid = self.dropped = self.mask_ahead = None
        self.missing = self.reduced_at = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the samples, for beam search."""
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some samples."""
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sample."""
        super().batch_repeat_interleave(repeats)
        self.mask_ahead = None
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if self.dropped is not None:
            self.dropped = self.dropped.repeat_interleave(repeats, dim=0)

    def _take(self, indices: torch.Tensor) -> None:
        self.mask_ahead = None
        if self.valid is not None:
            self.valid = self.valid[indices.to(self.valid.device)]
        if self.dropped is not None:
            self.dropped = self.dropped[indices.to(self.dropped.device)]


def layer_of(cache: Cache, index: int) -> DynamicLayer | None:
    """A layer of a cache that `check_can_shrink` let pass, None where the cache has not made it yet."""
    existing: Any = cache.layers[index] if index < len(cache.layers) else None
    layer: DynamicLayer | None = existing
    return layer


def tokens_in(cache: Any, num_layers: int) -> int:
    """Tokens of the conversation that a cache stands for; 0 without one. Plain integers: nothing waits for a device.

    Raises:
        CacheError: its layers do not agree, so that some would answer with keys that others do not have.
    """
    first: tuple[int, int] | None = None
    for index, layer in enumerate(() if cache is None else cache.layers[:num_layers]):
        length = layer.outer if isinstance(layer, ReducedLayer) else plain_length(layer)
        if length is None:
            continue
        if first is None:
            first = index, length
        elif length != first[1]:
            raise CacheError(
                f"cache: layer {first[0]} stands for {first[1]} tokens of the conversation, layer {index} for "
                f"{length}; it was cropped or filled in part: start again with a fresh cache"
            )
    return 0 if first is None else first[1]


def check_filled(cache: Any, num_layers: int, tokens: int) -> None:
    """Refuses a cache that a forward has not filled as planned.

    Args:
        cache: the forward's cache, behind its last layer.
        num_layers: decoder layers of the model.
        tokens: of the conversation, that every layer must stand for now.

    Raises:
        CacheError: a layer got other keys than were planned, or none.
    """
    layers = cache.layers[:num_layers]
    waiting = [n for n, layer in enumerate(layers) if isinstance(layer, ReducedLayer) and layer.pending]
    if waiting or tokens_in(cache, num_layers) != tokens:
        what = (
            f"layers {', '.join(map(str, waiting))} got no keys"
            if waiting
            else f"its layers stand for {tokens_in(cache, num_layers)} tokens"
        )
        raise CacheError(
            f"cache: the forward brings the conversation to {tokens} tokens, but {what}: the keys went somewhere else, "
            "and later tokens would be answered wrongly; report this with the output of `trio doctor`"
        )


def check_can_shrink(cache: Any, first: int, num_layers: int, pipeline_name: str) -> None:
    """Refuses caches whose layers cannot hold different numbers of tokens.

    Args:
        cache: the cache of a forward, or None.
        first: the first layer that will hold fewer tokens.
        num_layers: decoder layers of the model.
        pipeline_name: the pipeline that is about to reduce.

    Raises:
        CacheError: naming the cache and what to use.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise CacheError(f"cache: found a {type(cache).__name__}; use transformers.DynamicCache")
    lazily = cache.layer_class_to_replicate
    if len(cache.layers) < num_layers and lazily is not None and lazily is not DynamicLayer:
        raise _cannot_hold(cache, lazily)
    for index in range(first, min(len(cache.layers), num_layers)):
        layer = cache.layers[index]
        if isinstance(layer, ReducedLayer):
            if layer.pipeline_name != pipeline_name:
                raise CacheError(
                    f"cache: it was compressed by the pipeline {layer.pipeline_name!r}, but {pipeline_name!r} is "
                    "attached; go on with the first, or start with a fresh cache"
                )
        elif type(layer) not in (DynamicLayer, FirstLayer):
            raise _cannot_hold(cache, type(layer))


def _cannot_hold(cache: Cache, layer: type) -> CacheError:
    return CacheError(
        f"cache: {type(cache).__name__} has layers of type {layer.__name__}, which cannot hold a different number of "
        "tokens in each layer; pass a transformers.DynamicCache(), without a config"
    )


def reduced_layer(cache: Cache, index: int, pipeline_name: str, past_valid: torch.Tensor | None) -> ReducedLayer:
    """The cache's layer as a `ReducedLayer`, taking over what it already holds.

    Args:
        cache: the cache, already checked by `check_can_shrink`.
        index: the decoder layer.
        pipeline_name: the pipeline that reduces.
        past_valid: bool ``(B, past)``, padding among what the layer holds; None where there is none.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]  # transformers gives no types
    layer: Any = cache.layers[index]
    if isinstance(layer, ReducedLayer):
        return layer
    new = ReducedLayer(pipeline_name)
    if layer.is_initialized and layer.get_seq_length():
        vars(new).update(vars(layer))  # whatever else a release keeps there
    new.valid = past_valid
    cache.layers[index] = new
    first: Any = cache.layers[0]
    if isinstance(first, ReducedLayer):
        first.peers = cache.layers
    elif type(first) is DynamicLayer:
        cache.layers[0] = FirstLayer.of(first, cache.layers)
    return new


def bytes_of(cache: Any) -> tuple[tuple[int, int], ...] | None:
    """For each layer of a cache the bytes that it holds, and what it would hold with the whole conversation."""
    if cache is None:
        return None
    sizes = []
    for layer in cache.layers:
        held = 0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
        keys = layer.keys.shape[-2] if held else 1
        sizes.append((held, held // keys * int(layer.get_seq_length()) if held else 0))
    return tuple(sizes)
