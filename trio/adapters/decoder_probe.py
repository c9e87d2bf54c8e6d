"""Probes of standard decoder layers, composed from the layers' own stock submodules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.flops import sums_are_cheaper
from ..core.ops import take_rows
from ..core.probe import LayerInputs, Probe, Rows
from ..errors import InputError, UnsupportedModelError

Rotate = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Anatomy:
    """The submodules of one pre-norm decoder layer with rotary grouped-query attention.

    The submodules are called as modules, so that offloaded, quantised and LoRA weights keep working.

    Attributes:
        input_norm: norm in front of the attention.
        query: projections of the hidden states, with `key` and `value`.
        key: see `query`.
        value: see `query`.
        output: the projection behind the attention.
        query_norm: norm of each head's queries, or None; `key_norm` likewise.
        key_norm: see `query_norm`.
        attention_norm: norm of the attention's output before it joins the residual stream, or None.
        mlp_norm: norm in front of the MLP.
        mlp: the MLP.
        output_norm: norm of the MLP's output before it joins the residual stream, or None.
        head_dim: features of a head.
        scaling: factor on the attention scores.
        rotate: applies rotary embeddings to ``(B, heads, R, head dim)``.
        linear_values: whether `value` may be applied to weighted sums of hidden states in place of each of them, see
            `values_are_linear`.
    """

    input_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    attention_norm: nn.Module | None
    mlp_norm: nn.Module
    mlp: nn.Module
    output_norm: nn.Module | None
    head_dim: int
    scaling: float
    rotate: Rotate
    linear_values: bool = False


def llama_like(module: nn.Module, rotate: Rotate | None = None) -> Anatomy | None:
    """The anatomy of a layer with Llama's submodule names (Mistral, Qwen2, Qwen3 and others); None without them."""
    layer: Any = module
    attention = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")
    outer = ("input_layernorm", "post_attention_layernorm", "mlp")
    if attention is None or not all(hasattr(attention, n) for n in names) or not all(hasattr(layer, n) for n in outer):
        return None
    sandwich = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 2 and 3: norms on both sides of each block
    return Anatomy(
        input_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        attention_norm=layer.post_attention_layernorm if sandwich else None,
        mlp_norm=layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm,
        mlp=layer.mlp,
        output_norm=getattr(layer, "post_feedforward_layernorm", None),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        rotate=rotate or rotate_half,
    )


def rotate_half(states: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in Llama's convention.

    Args:
        states: ``(B, heads, R, head dim)``.
        embeddings: cosines and sines, ``(B, R, rotated dim)``; where a head has more features, its first ones rotate.
    """
    cos, sin = (e.unsqueeze(1) for e in embeddings)
    rotated = cos.shape[-1]
    turning, still = states[..., :rotated], states[..., rotated:]
    first, second = turning.chunk(2, dim=-1)
    # In this order the sum lies in memory as `cat` lays it out, whole heads side by side: no product has to copy it.
    turned = torch.cat((-second, first), dim=-1) * sin + turning * cos
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def take_positions(embeddings: Any, index: torch.Tensor) -> Any:
    """Rotary embeddings of chosen columns.

    Args:
        embeddings: a tensor ``(..., B or 1, S, features)``, or tuples and dicts of such.
        index: int64 ``(B, R)``.

    Returns:
        The same structure with ``(..., B, R, features)``.
    """
    if isinstance(embeddings, torch.Tensor):
        batch, rows = index.shape
        lead, features = embeddings.shape[:-3], embeddings.shape[-1]
        full = embeddings.expand(*lead, batch, *embeddings.shape[-2:])
        where = index.to(embeddings.device)[..., None].expand(*lead, batch, rows, features)
        return full.gather(-2, where)
    if isinstance(embeddings, (tuple, list)):
        return type(embeddings)(take_positions(item, index) for item in embeddings)
    if isinstance(embeddings, dict):
        return {key: take_positions(item, index) for key, item in embeddings.items()}
    raise InputError(f"rotary embeddings: found {type(embeddings).__name__}, expected tensors in tuples or dicts")


def _chosen(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Chosen columns of ``(B, S, D)``: ``(B, R, D)``."""
    return take_rows(hidden, rows.index) if rows.span is None else hidden[:, rows.span]


def _positions_of(embeddings: Any, rows: Rows) -> Any:
    """As `take_positions`, of rows; a view where they are the same columns in every sample."""
    if rows.span is None:
        return take_positions(embeddings, rows.index)
    if isinstance(embeddings, (tuple, list)):
        return type(embeddings)(_positions_of(item, rows) for item in embeddings)
    if isinstance(embeddings, dict):
        return {key: _positions_of(item, rows) for key, item in embeddings.items()}
    if not isinstance(embeddings, torch.Tensor):
        return take_positions(embeddings, rows.index)  # which names what it found
    return embeddings[..., rows.span, :]


class RowProbe(Probe):
    """Computes the chosen rows only: keys of all tokens, values of all tokens or of the sums that the rows read."""

    how = "rows"

    def __init__(
        self, anatomy: Anatomy, inputs: LayerInputs, logits: Callable[[torch.Tensor], torch.Tensor], window: int | None
    ) -> None:
        """Binds the probe; `window` is the sliding window of the layer in tokens, None for full attention."""
        super().__init__(inputs, logits)
        self._anatomy = anatomy
        self._window = window

    def attention_rows(self, rows: Rows) -> torch.Tensor:
        """See `Probe.attention_rows`."""
        with torch.no_grad():
            hidden = self._anatomy.input_norm(self.inputs.hidden)
            weights, _ = self._attention(self.inputs, hidden, rows)
        return weights[..., weights.shape[-1] - hidden.shape[1] :]

    def _forward_rows(self, inputs: LayerInputs, rows: Rows) -> torch.Tensor:
        a = self._anatomy
        hidden = a.input_norm(inputs.hidden)
        weights, groups = self._attention(inputs, hidden, rows)
        _, heads, count, length = weights.shape
        cheaper = sums_are_cheaper(heads * count, length, hidden.shape[-1], groups * a.head_dim, a.head_dim)
        mixes = a.linear_values and inputs.past is None and cheaper
        attended = (self._values_of_sums if mixes else self._sums_of_values)(inputs, hidden, weights, groups)
        attended = a.output(attended)
        attended = a.attention_norm(attended) if a.attention_norm else attended
        out: torch.Tensor = _chosen(inputs.hidden, rows) + attended
        fed = _first(a.mlp(a.mlp_norm(out)))
        out = out + (a.output_norm(fed) if a.output_norm else fed)
        return out

    def _sums_of_values(
        self, inputs: LayerInputs, hidden: torch.Tensor, weights: torch.Tensor, groups: int
    ) -> torch.Tensor:
        """Weighted sums of the values of all tokens, ``(B, R, heads * head dim)``, as a layer computes them."""
        values = self._heads(self._anatomy.value(hidden))
        if inputs.past is not None:
            values = torch.cat([inputs.past.values.to(values), values], dim=2)
        sums = _grouped(weights.to(values.dtype), groups) @ values  # (B, kv heads, group * R, head dim)
        batch, heads, count, _ = weights.shape
        return sums.reshape(batch, heads, count, -1).transpose(1, 2).reshape(batch, count, -1)

    def _values_of_sums(
        self, inputs: LayerInputs, hidden: torch.Tensor, weights: torch.Tensor, groups: int
    ) -> torch.Tensor:
        """The same from the values of weighted sums of hidden states: few of them, where the rows are few.

        The weights of a row sum to one, so that a bias comes out as it is. Each sum belongs to one head, and the
        projection gives the values of all heads: those of its own are taken.
        """
        batch, heads, count, length = weights.shape
        sums = weights.to(hidden.dtype).reshape(batch, heads * count, length) @ hidden
        values = self._anatomy.value(sums).view(batch, groups, heads // groups, count, groups, -1)
        own: torch.Tensor = values.diagonal(dim1=1, dim2=4)  # (B, group, R, head dim, kv heads)
        return own.permute(0, 2, 4, 1, 3).reshape(batch, count, -1)

    def _attention(self, inputs: LayerInputs, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, int]:
        """Attention probabilities of the rows over past and present columns, and the number of key-value heads.

        The probabilities are float32 ``(B, heads, R, P + S)``.
        """
        a = self._anatomy
        keys = self._heads(a.key(hidden), a.key_norm)
        keys = a.rotate(keys, inputs.rotary)
        queries = self._heads(a.query(_chosen(hidden, rows)), a.query_norm)
        queries = a.rotate(queries, _positions_of(inputs.rotary, rows))
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        hides = columns > rows.index[..., None]  # (B, R, S), True where a row sees nothing
        if inputs.padded:
            hides = hides | ~inputs.valid[:, None]
        if inputs.past is not None:
            keys = torch.cat([inputs.past.keys.to(keys), keys], dim=2)
            before = ~inputs.past.valid[:, None].expand(-1, hides.shape[1], -1)
            hides = torch.cat([before, hides], dim=2)
        if self._window is not None:
            past = keys.shape[2] - hidden.shape[1]
            everything = torch.arange(keys.shape[2], device=hidden.device)
            hides = hides | (everything <= past + rows.index[..., None] - self._window)
        batch, heads, count = queries.shape[:3]
        scores = _grouped(queries, keys.shape[1]) @ keys.transpose(2, 3) * a.scaling
        scores = scores.reshape(batch, heads, count, -1)
        scores = scores.masked_fill(hides[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1, dtype=torch.float32), keys.shape[1]

    def _heads(self, states: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """``(B, S, heads * head dim)`` to ``(B, heads, S, head dim)``, through the heads' norm where there is one."""
        split = states.view(*states.shape[:-1], -1, self._anatomy.head_dim)
        heads: torch.Tensor = norm(split) if norm else split
        return heads.transpose(1, 2)


def values_are_linear(value: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether a value projection maps weighted sums of hidden states ``(1, S, D)`` to sums of what it maps them to.

    A norm of the values or activations that are quantised as they come do not; weights that are quantised, adapted or
    offloaded do. Weights are those of an attention row: at least 0, summing to one.
    """
    length = hidden.shape[1]
    weights = torch.ones(length, length, device=hidden.device, dtype=torch.float32).tril()
    weights = (weights / weights.sum(1, keepdim=True)).to(hidden.dtype)
    sums = (weights @ value(hidden)).float()
    error = float((value(weights @ hidden).float() - sums).norm() / sums.norm().clamp_min(1e-12))
    return error < max(torch.finfo(hidden.dtype).eps, 1e-5)


def _grouped(states: torch.Tensor, groups: int) -> torch.Tensor:
    """``(B, heads, R, X)`` to ``(B, groups, heads / groups * R, X)``: query heads that share a key-value head."""
    batch, heads, count, features = states.shape
    return states.reshape(batch, groups, heads // groups * count, features)


class LayerProbe(Probe):
    """Runs the whole layer, whatever its anatomy: the same values, slower, without attention rows."""

    how = "layer"

    def __init__(
        self,
        run: Callable[[LayerInputs], torch.Tensor],
        inputs: LayerInputs,
        logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Binds the probe; `run` is the layer's own forward, ``(B, S, D)`` out."""
        super().__init__(inputs, logits)
        self._run = run

    def attention_rows(self, rows: Rows) -> torch.Tensor:
        """Refused: a layer's own forward gives no chosen rows of attention."""
        raise UnsupportedModelError(
            "probe: the anatomy of this decoder layer is not known, so attention rows cannot be had; "
            "use a scorer that needs gradients only, such as 'objective-gradient'"
        )

    def _forward_rows(self, inputs: LayerInputs, rows: Rows) -> torch.Tensor:
        return _chosen(self._run(inputs), rows)


def _first(output: Any) -> torch.Tensor:
    """The tensor itself, or the first of a tuple (mixtures of experts return their routing as well)."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
