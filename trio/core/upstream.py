"""All that this package takes from transformers' internals: names of arguments and outputs, cache classes, masks.

transformers renames these in minor releases. Nothing else in the package spells them. What is needed is looked up in
signatures and classes when a pipeline is made; what cannot be found is refused by name. A value that is absent is never
taken for a meaning: a forward that was asked for a cache must meet one in every layer.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import InputError, UnsupportedModelError

try:
    from transformers import masking_utils
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.generation.utils import GenerationMixin
except ImportError as error:  # pragma: no cover - a release that moved them; shown by a test in a fresh interpreter
    raise UnsupportedModelError(
        f"transformers {transformers.__version__}: looked for its caches, masks and generation ({error}), found them "
        "moved; install a release that this version of trio-vlm was tested on (docs/support.md), or a newer trio-vlm"
    ) from error

__all__ = [
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "Encoded",
    "LayerCall",
    "ModelCall",
    "Role",
    "StaticCache",
    "Upstream",
]


#: The newest release that the tests ran on; on a newer one a canary sings before a pipeline is attached.
NEWEST_TESTED = "5.24.0"


class Role(StrEnum):
    """What an argument means, whatever a release calls it."""

    IDS = "token ids"
    EMBEDDINGS = "input embeddings"
    HIDDEN = "hidden states"
    MASK = "attention mask"
    POSITIONS = "position ids"
    ROTARY = "rotary embeddings"
    CACHE = "key-value cache"
    USE_CACHE = "use of a cache"
    ENCODED = "encoder outputs"
    LABELS = "labels"
    LOGITS_TO_KEEP = "logits to keep"


#: The names of each role in the releases known so far, newest first.
NAMES: Mapping[Role, tuple[str, ...]] = {
    Role.IDS: ("input_ids",),
    Role.EMBEDDINGS: ("inputs_embeds",),
    Role.HIDDEN: ("hidden_states",),
    Role.MASK: ("attention_mask",),
    Role.POSITIONS: ("position_ids",),
    Role.ROTARY: ("position_embeddings",),
    Role.CACHE: ("cache", "past_key_values"),
    Role.USE_CACHE: ("use_cache",),
    Role.ENCODED: ("mm_encoder_outputs",),
    Role.LABELS: ("labels",),
    Role.LOGITS_TO_KEEP: ("logits_to_keep",),
}
#: What processors and forwards call the mask of a batch, and what a vision tower's layers are called with.
MASK, HIDDEN, ROTARY, EMBEDDINGS = (NAMES[r][0] for r in (Role.MASK, Role.HIDDEN, Role.ROTARY, Role.EMBEDDINGS))
#: Ways of generating that the runtime has to know of, and where `generate` takes them.
ASSISTANT = "assistant_model"
LOOKUP, CHUNK, CACHE_KIND = "prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation"
CONFIGURATION = "generation_config"
#: The caller's own way of generating, which may do anything.
CUSTOM_GENERATE = "custom_generate"
#: Caches by name whose layers may hold different numbers of tokens.
RAGGED_CACHES = ("dynamic", "dynamic_full", "offloaded")
#: What `ReducedLayer` relies on in a cache layer: methods, and how many values each is called with.
_LAYER_METHODS: Mapping[str, int] = {
    "update": 2,
    "get_seq_length": 0,
    "get_mask_sizes": 1,
    "crop": 1,
    "reset": 0,
    "reorder_cache": 1,
    "batch_select_indices": 1,
    "batch_repeat_interleave": 1,
}


def version() -> str:
    """The installed transformers."""
    return str(transformers.__version__)


def unsupported(where: str, looked_for: str, found: str) -> UnsupportedModelError:
    """The error of a lookup that failed.

    Args:
        where: the class or function that was looked at.
        looked_for: what should be there.
        found: what is there instead.
    """
    return UnsupportedModelError(
        f"{where}: looked for {looked_for}, found {found} (transformers {version()}). Compressed answers could be "
        "wrong without an error, so this is refused: use a release from docs/support.md, or report what `trio doctor` "
        "prints"
    )


@dataclass(frozen=True)
class ModelCall:
    """How a model or a part of it is called.

    Attributes:
        where: its class, for messages.
        parameters: names of its parameters in order.
        names: the name of each role that was found.
        open: whether it takes further keywords.
    """

    where: str
    parameters: tuple[str, ...]
    names: Mapping[Role, str]
    open: bool

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name; those that were passed by position get the name of their parameter.

        Raises:
            UnsupportedModelError: more values came by position than the signature has names.
        """
        if not args:
            return dict(kwargs)
        if len(args) > len(self.parameters):
            known = ", ".join(self.parameters) or "none"
            raise unsupported(f"{self.where}.forward", f"values by position for {known}", f"{len(args)} values")
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def read(self, role: Role, given: Mapping[str, Any]) -> Any:
        """The value of a role in a call, also under a name that a release still accepts; None where it is absent."""
        for name in NAMES[role]:
            value = given.get(name)
            if value is not None:
                return value
        return None

    def stray_cache(self, given: Mapping[str, Any]) -> str | None:
        """The argument that holds a cache under a name that is not known."""
        return next((n for n, v in given.items() if isinstance(v, Cache) and n not in NAMES[Role.CACHE]), None)


def model_call(module: nn.Module, wanted: Iterable[Role], optional: Iterable[Role] = ()) -> ModelCall:
    """Looks up how a module is called.

    Args:
        module: the module; wrappers of its `forward` are looked through.
        wanted: roles that it must take.
        optional: roles that it may take.

    Raises:
        UnsupportedModelError: a role has no known name in the signature.
    """
    where = type(module).__name__
    parameters = inspect.signature(module.forward).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    order = tuple(n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    explicit = {n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    names: dict[Role, str] = {}
    for role in (*wanted, *optional):
        name = next((n for n in NAMES[role] if n in explicit), None)
        if name is not None:
            names[role] = name
    missing = [role for role in wanted if role not in names]
    if missing:
        role = missing[0]
        raise unsupported(
            f"{where}.forward",
            f"the {role} under {' or '.join(NAMES[role])}",
            f"the parameters {', '.join(parameters) or 'none'}{_typed_like_a_cache(role, parameters.values())}",
        )
    return ModelCall(where, order, names, is_open)


def _typed_like_a_cache(role: Role, parameters: Iterable[inspect.Parameter]) -> str:
    """A hint at a parameter that is annotated with a cache under another name."""
    if role is not Role.CACHE:
        return ""
    like = [p.name for p in parameters if "Cache" in str(p.annotation)]
    return f", of which {', '.join(like)} takes a cache" if like else ""


@dataclass(frozen=True)
class LayerCall(ModelCall):
    """How a decoder layer is called: the roles that a shrunk sequence changes, and everything else it is given."""

    @property
    def hidden(self) -> str:
        """The name of the hidden states."""
        return self.names[Role.HIDDEN]

    @property
    def mask(self) -> str:
        """The name of the mask."""
        return self.names[Role.MASK]

    @property
    def rotary(self) -> str:
        """The name of the rotary embeddings."""
        return self.names[Role.ROTARY]

    @property
    def cache(self) -> str:
        """The name of the cache."""
        return self.names[Role.CACHE]

    def rotary_of(self, given: Mapping[str, Any]) -> Any:
        """The rotary embeddings of a call.

        Raises:
            UnsupportedModelError: the layer got none: it computes them itself, or gets them in another way.
        """
        value = given.get(self.rotary)
        if value is None:
            raise unsupported(
                f"{self.where}.forward",
                f"the {Role.ROTARY} as `{self.rotary}`",
                f"a call with {', '.join(n for n, v in given.items() if v is not None) or 'nothing'}",
            )
        return value

    def position_names(self, given: Mapping[str, Any]) -> list[str]:
        """The names under which a call holds position ids, also among further keywords."""
        return [name for name in NAMES[Role.POSITIONS] if name in given]

    def check_mask(self, given: Mapping[str, Any]) -> None:
        """Refuses a call whose mask is in a form that cannot be replaced.

        Raises:
            UnsupportedModelError: the mask is missing from the call, or is not None, a tensor or a block mask.
        """
        if self.mask not in given:
            arguments = ", ".join(given) or "no argument"
            raise unsupported(f"{self.where}.forward", f"the {Role.MASK} as `{self.mask}`", f"a call with {arguments}")
        mask = given[self.mask]
        if mask is not None and not isinstance(mask, torch.Tensor) and not _is_block_mask(mask):
            raise unsupported(
                f"{self.where}.forward", f"the {Role.MASK} as a tensor or a block mask", f"a {type(mask).__name__}"
            )

    def shrink_others(self, given: Mapping[str, Any], columns: torch.Tensor, length: int) -> dict[str, Any]:
        """The arguments of no known role, those with a value for each token taken at the tokens that remain.

        Args:
            given: the call's arguments by name.
            columns: int64 ``(B, S')``, the columns that remain.
            length: S, tokens that the call was made for.

        Raises:
            UnsupportedModelError: it cannot be told whether an argument belongs to the tokens.
        """
        return {name: self._shrunk(name, value, columns, length) for name, value in self.others(given).items()}

    def others(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of no known role that are more than a plain setting."""
        plain = (bool, int, float, str, torch.dtype, torch.device)
        return {
            name: value
            for name, value in given.items()
            if name not in _KNOWN and value is not None and not isinstance(value, plain)
        }

    def _shrunk(self, name: str, value: Any, columns: torch.Tensor, length: int) -> Any:
        if isinstance(value, torch.Tensor):
            batch = columns.shape[0]
            along = [axis for axis, size in enumerate(value.shape) if size in (length, batch * length) and size > 1]
            if not along:
                return value
            if value.ndim >= 2 and value.shape[0] in (1, batch) and along == [1] and value.shape[1] == length:
                full = value.expand(batch, *value.shape[1:])
                index = columns.to(value.device).reshape(*columns.shape, *[1] * (value.ndim - 2))
                return full.gather(1, index.expand(*columns.shape, *value.shape[2:]))
            raise unsupported(
                f"{self.where}.forward, argument `{name}`",
                f"a value for each token as (batch, tokens, ...) with {batch} samples of {length} tokens",
                f"a tensor of shape {tuple(value.shape)}, of which it cannot be told how it shrinks",
            )
        if isinstance(value, (tuple, list)):
            return type(value)(self._shrunk(name, item, columns, length) for item in value)
        raise unsupported(
            f"{self.where}.forward, argument `{name}`",
            "a tensor, a number or a setting",
            f"a {type(value).__name__}, of which it cannot be told how it shrinks",
        )


_LAYER_ROLES = (Role.HIDDEN, Role.MASK, Role.POSITIONS, Role.ROTARY, Role.CACHE, Role.USE_CACHE)
_KNOWN = frozenset(name for role in _LAYER_ROLES for name in NAMES[role])


def layer_call(layer: nn.Module, model: ModelCall) -> LayerCall:
    """Looks up how a decoder layer is called.

    Args:
        layer: the layer.
        model: the call of its language model; a layer that takes further keywords is given the cache under that name.

    Raises:
        UnsupportedModelError: hidden states, mask, rotary embeddings or cache have no known name.
    """
    base = model_call(layer, (), _LAYER_ROLES)
    names, order = dict(base.names), base.parameters
    if base.open and not order:  # a wrapper that hands everything on: what it is called with is checked at the call
        names[Role.HIDDEN] = NAMES[Role.HIDDEN][0]
        order = (names[Role.HIDDEN],)
    if Role.HIDDEN not in names:
        model_call(layer, (Role.HIDDEN,))  # raises, and says what was found
    for role in (Role.MASK, Role.ROTARY, Role.CACHE):
        if role not in names and base.open:
            names[role] = model.names.get(role, NAMES[role][0])
        elif role not in names:
            model_call(layer, (role,))  # raises, and says what was found
    return LayerCall(base.where, order, names, base.open)


@dataclass(frozen=True)
class Upstream:
    """All that was resolved for one model.

    Attributes:
        model: how the model that users call is called.
        multimodal: how the module that merges text and images is called.
        language_model: how the text decoder is called.
        layers: how each decoder layer is called.
    """

    model: ModelCall
    multimodal: ModelCall
    language_model: ModelCall
    layers: tuple[LayerCall, ...]

    @classmethod
    def of(
        cls, model: nn.Module, multimodal: nn.Module, language_model: nn.Module, layers: Sequence[nn.Module]
    ) -> Upstream:
        """Resolves what a runtime needs.

        Raises:
            UnsupportedModelError: something is not there; the message says what was looked for, and where.
        """
        check_cache_classes()
        check_generation()
        mask_arguments()
        text = model_call(language_model, (Role.EMBEDDINGS, Role.MASK, Role.CACHE), (Role.POSITIONS, Role.USE_CACHE))
        return cls(
            model=model_call(model, (), (Role.LABELS, Role.LOGITS_TO_KEEP)),
            multimodal=model_call(multimodal, (Role.IDS,), (Role.EMBEDDINGS, Role.ENCODED)),
            language_model=text,
            layers=tuple(layer_call(layer, text) for layer in layers),
        )

    def describe(self) -> dict[str, str]:
        """What was found, a line an entry, for reports of bugs."""
        layer = self.layers[0]
        return {
            "transformers": version(),
            "cache argument": f"{self.language_model.names[Role.CACHE]} (language model), {layer.cache} (layer)",
            "mask argument": f"{self.language_model.names[Role.MASK]} (language model), {layer.mask} (layer)",
            "rotary argument": layer.rotary,
            "encoder outputs": self.multimodal.names.get(Role.ENCODED, "not taken"),
            "mask function": f"create_causal_mask({', '.join(sorted(set(mask_arguments().values())))})",
            "cache layer": f"{DynamicLayer.__module__}.{DynamicLayer.__name__}",
        }


def default_model(model_type: str) -> tuple[type[nn.Module], Any]:
    """The image-text-to-text class of a model type and its default configuration; nothing is downloaded.

    Raises:
        UnsupportedModelError: this release has no such class.
    """
    try:
        config = transformers.AutoConfig.for_model(model_type)
        table: Any = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return table[type(config)], config
    except (KeyError, ValueError, AttributeError) as error:
        raise unsupported("AutoModelForImageTextToText", f"a class for {model_type!r}", "none") from error


_BITS = ("4bit", "8bit")
_QUANTISED = ("quant_method", "quant_type", *(f"load_in_{bits}" for bits in _BITS))


def quantisation(config: Any) -> str:
    """How a checkpoint's weights are quantised, in the words of its configuration; empty where it says nothing.

    Args:
        config: of the model.

    Returns:
        For example ``torchao Int8WeightOnlyConfig`` or ``bitsandbytes 8bit``.
    """
    given = getattr(config, "quantization_config", None)
    facts = dict(given) if isinstance(given, Mapping) else {n: getattr(given, n, None) for n in _QUANTISED}
    method, kind, *bits = (facts.get(name) for name in _QUANTISED)
    words = [getattr(method, "value", method)]
    if kind is not None and not isinstance(kind, Mapping):
        words.append(kind if isinstance(kind, str) else type(kind).__name__)
    words += [name for name, given_bits in zip(_BITS, bits, strict=True) if given_bits]
    return " ".join(str(word) for word in words if word)


@contextmanager
def silenced() -> Iterator[None]:
    """transformers' own messages left out for the block."""
    messages: Any = transformers.logging
    before = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(before)


# Calls of a language model


def uses_cache(call: ModelCall, given: Mapping[str, Any], config: Any) -> bool:
    """Whether a forward of the language model was asked to keep keys and values."""
    argument = call.read(Role.USE_CACHE, given)
    return bool(getattr(config, NAMES[Role.USE_CACHE][0], True) if argument is None else argument)


def hidden_of(output: Any, where: str) -> torch.Tensor:
    """The hidden states that a language model gave.

    Raises:
        UnsupportedModelError: the output has another form.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, torch.Tensor):
        raise unsupported(f"{where}: its output", "`last_hidden_state`", f"a {type(output).__name__}")
    return hidden


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where the forward kept none.

    Raises:
        UnsupportedModelError: the output has no field for it.
    """
    for name in NAMES[Role.CACHE]:
        if name in _fields(output):
            return getattr(output, name)
    raise unsupported(
        f"{type(output).__name__}", f"its cache under {' or '.join(NAMES[Role.CACHE])}", ", ".join(_fields(output))
    )


def _fields(output: Any) -> tuple[str, ...]:
    return tuple(getattr(output, "__dataclass_fields__", ()))


#: What a modality's encoder gave, by the modality's name.
Encoded = Mapping[str, Any]


def encoder_outputs(call: Mapping[str, Any]) -> Encoded:
    """What `generate` had encoded before a forward, by modality; empty where it encodes within the forward."""
    for name in NAMES[Role.ENCODED]:
        given = call.get(name)
        if given is not None:
            return {modality: output for modality, output in given.items() if output is not None}
    return {}


def feature_counts(output: Any) -> tuple[int, ...] | None:
    """Feature rows of each image that an encoder method gave; None where that cannot be told.

    Args:
        output: of the method: an output with the projected features, a tensor ``(images, rows, D)``, or a sequence of
            ``(rows, D)``.
    """
    features = getattr(output, "pooler_output", output)
    if isinstance(features, torch.Tensor):
        return (features.shape[1],) * features.shape[0] if features.ndim == 3 else None
    if isinstance(features, (list, tuple)) and all(isinstance(f, torch.Tensor) and f.ndim >= 2 for f in features):
        return tuple(int(f.shape[:-1].numel()) for f in features)
    return None


def features_of(output: Any) -> Any:
    """What an encoder method gave, without what it saw on its way: hidden states and attentions of its blocks.

    A model reads the projected features alone; the hidden states of LLaVA-1.5's tower are six times as large.
    """
    return copied_output(output, leave_out=("hidden_states", "attentions"))


def copied_output(output: Any, *, leave_out: Sequence[str] = ()) -> Any:
    """An output whose containers are new, so that who gets it may put other values into them; tensors are shared.

    Some releases set the projected features as an attribute that is no field of the output.
    """
    if isinstance(output, list):
        return list(output)
    if not isinstance(output, Mapping):
        return output
    new = type(output)(**{name: value for name, value in output.items() if name not in leave_out})
    for name, value in vars(output).items():
        if name not in leave_out and value is not None:
            setattr(new, name, list(value) if isinstance(value, list) else value)
    return new


# Generation


def check_generation() -> None:
    """Refuses a release whose `generate` takes the ways that cannot work under other names.

    Raises:
        UnsupportedModelError: a way of generating could not be seen.
    """
    parameters = inspect.signature(GenerationMixin.generate).parameters
    settings = vars(GenerationConfig())  # type: ignore[no-untyped-call]  # transformers gives no types
    missing = [name for name in (CONFIGURATION, ASSISTANT) if name not in parameters]
    for name in [*missing, *(name for name in (LOOKUP, CHUNK, CACHE_KIND) if name not in settings)]:
        raise unsupported("generate", f"`{name}`", "none, so that a way of generating could not be refused")


def keywords(values: Mapping[Role, Any]) -> dict[str, Any]:
    """Arguments of a model or of `generate` by role, under the names of the installed release."""
    return {cache_name() if role is Role.CACHE else NAMES[role][0]: value for role, value in values.items()}


def cache_name() -> str:
    """The name under which `generate`, models and mask functions take a cache."""
    return masked_name(masking_utils.create_causal_mask, Role.CACHE)


# Masks


def masked_name(function: Callable[..., Any], role: Role) -> str:
    """The name of a role in a function of transformers.

    Raises:
        UnsupportedModelError: it has none of the known ones.
    """
    parameters = inspect.signature(function).parameters
    for name in NAMES[role]:
        if name in parameters:
            return name
    raise unsupported(
        function.__name__, f"the {role} under {' or '.join(NAMES[role])}", f"the parameters {', '.join(parameters)}"
    )


def mask_arguments() -> Mapping[str, str]:
    """The arguments of transformers' causal mask, by what they mean here.

    Raises:
        UnsupportedModelError: one is not there.
    """
    function = getattr(masking_utils, "create_causal_mask", None)
    if function is None or not hasattr(masking_utils, "sliding_window_overlay"):
        raise unsupported("masking_utils", "create_causal_mask and sliding_window_overlay", "one of them gone")
    # torch.compile looks past the memory of a function, and warns.
    return _mask_arguments.__wrapped__(function) if torch.compiler.is_compiling() else _mask_arguments(function)


@functools.lru_cache(maxsize=8)  # asked for at every mask; by function, so that another one is looked at anew
def _mask_arguments(function: Callable[..., Any]) -> Mapping[str, str]:
    parameters = inspect.signature(function).parameters
    for name in ("config", "layer_idx", "and_mask_function"):
        if name not in parameters:
            raise unsupported("create_causal_mask", f"`{name}`", f"the parameters {', '.join(parameters)}")
    roles = (Role.EMBEDDINGS, Role.MASK, Role.CACHE, Role.POSITIONS)
    return {
        **{role.name.lower(): masked_name(function, role) for role in roles},
        "config": "config",
        "layer": "layer_idx",
        "overlay": "and_mask_function",
    }


class _Lengths:
    """What transformers' mask functions ask of a cache, for one layer whose real length is known."""

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, past: int) -> None:
        self._past = past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + query_length, 0


def causal_mask(
    config: Any,
    hidden: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    past: int,
    layer: int,
    window: int | None = None,
) -> Any:
    """The mask of a decoder layer in the form that the model's attention backend takes.

    Built by transformers' own mask functions: 4-D for eager and sdpa, a block mask for flex_attention, 2-D or None for
    flash-attention.

    Args:
        config: of the language model; its attention implementation decides the form.
        hidden: ``(B, S, D)``, the new tokens.
        valid: bool ``(B, past + S)``, None where no token is padding.
        past: tokens that the layer's cache really holds.
        layer: index of the layer.
        window: sliding window of the layer in tokens, None for full attention.

    Raises:
        UnsupportedModelError: the mask does not have the shape of queries and keys.
    """
    names = mask_arguments()
    given: dict[str, Any] = {
        names["config"]: config,
        names["embeddings"]: hidden,
        names["mask"]: valid,
        names["cache"]: _Lengths(past),
        names["positions"]: None,
        names["layer"]: layer,
    }
    if window is not None:
        given[names["overlay"]] = masking_utils.sliding_window_overlay(window)
    elif valid is not None:
        # An overlay that hides nothing: without one, masks for sdpa look at the padding, and the host waits.
        given[names["overlay"]] = _hides_nothing
    mask = masking_utils.create_causal_mask(**given)
    _check_shape(mask, hidden.shape[1], past + hidden.shape[1])
    return mask


def _hides_nothing(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key >= 0


def _check_shape(mask: Any, queries: int, keys: int) -> None:
    """Compares the plain integers of a mask's shape with what it was asked for."""
    if mask is None:
        return
    if isinstance(mask, torch.Tensor):
        expected = (keys,) if mask.ndim == 2 else (queries, keys)
        found = tuple(mask.shape[-len(expected) :])
    elif _is_block_mask(mask):
        expected, found = (queries, keys), tuple(mask.seq_lengths)
    else:
        raise unsupported("create_causal_mask", "None, a tensor or a block mask", f"a {type(mask).__name__}")
    if found != expected:
        raise unsupported("create_causal_mask", f"a mask for {expected} (queries, keys)", f"one for {found}")


def _is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask" and hasattr(mask, "seq_lengths")


# Image processors


@dataclass(frozen=True)
class PatchProcessor:
    """An image processor that cuts an image of any size into patches (those of Qwen2-VL and its heirs).

    Attributes:
        unit: pixels of a visual token's side.
        inner: the image processor itself.
    """

    unit: int
    inner: Any

    @property
    def resample(self) -> int:
        """Pillow's number of the filter that it resizes with; bicubic where it does not say."""
        found = getattr(self.inner, "resample", None)
        return 3 if found is None else int(found)

    def tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of that width and height.

        Raises:
            InputError: the processor takes no image of that size.
        """
        width, height = size
        try:
            patches = self.inner.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise InputError(f"image of {width}x{height} pixels: the processor refuses it ({error})") from error
        return int(patches) // int(self.inner.merge_size) ** 2

    def without_floor(self) -> PatchProcessor:
        """A copy that does not enlarge images that have few pixels."""
        inner = copy.copy(self.inner)
        inner.size = {**dict(inner.size), "shortest_edge": self.unit**2}
        return PatchProcessor(self.unit, inner)


def patch_processor(processor: Any) -> PatchProcessor | None:
    """The image processor of a processor where it is of that kind; None for every other one."""
    inner: Any = getattr(processor, "image_processor", None)
    size, merge, patch = (getattr(inner, name, None) for name in ("size", "merge_size", "patch_size"))
    counts = callable(getattr(inner, "get_number_of_image_patches", None))
    if not (merge and patch and size and counts) or "shortest_edge" not in dict(size):
        return None
    return PatchProcessor(int(patch) * int(merge), inner)


def with_image_processor(processor: Any, images: Any) -> Any:
    """A copy of a processor with another image processor."""
    changed = copy.copy(processor)
    changed.image_processor = images
    return changed


# Cache layers


def check_cache_classes() -> None:
    """Refuses a release whose cache layers lack what reduced layers rely on.

    Raises:
        UnsupportedModelError: naming the method.
    """
    for name, count in _LAYER_METHODS.items():
        method = getattr(DynamicLayer, name, None)
        if method is None:
            raise unsupported("DynamicLayer", f"its method `{name}`", "none")
        signature = inspect.signature(method)
        try:
            signature.bind(*[None] * (count + 1))  # and itself
        except TypeError:
            raise unsupported(f"DynamicLayer.{name}", f"{count} values to call it with", f"{signature}") from None
    cache = DynamicCache()
    for name in ("layers", "layer_class_to_replicate"):
        if not hasattr(cache, name):
            raise unsupported("DynamicCache", f"its attribute `{name}`", "none")
    for name in ("keys", "values", "is_initialized"):
        if not hasattr(_dynamic_layer(), name):
            raise unsupported("DynamicLayer", f"its attribute `{name}`", "none")


def _dynamic_layer() -> DynamicLayer:
    return DynamicLayer()  # type: ignore[no-untyped-call]  # transformers gives no types


def dynamic_cache(config: Any = None) -> Any:
    """A cache whose layers grow, each by itself; with a configuration, layers of the kinds that it names."""
    return DynamicCache() if config is None else DynamicCache(config=config)


def plain_length(layer: Any) -> int | None:
    """Keys that a dynamic cache layer holds, a plain integer; None for layers of another kind."""
    if not isinstance(layer, DynamicLayer) or getattr(layer, "is_sliding", True):
        return None
    return 0 if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0 else int(layer.keys.shape[-2])


def check_one_cache(first: Any, other: Any) -> None:
    """Refuses two different caches within a forward.

    Raises:
        InputError: they are not the same object.
    """
    if first is not None and other is not None and first is not other:
        raise InputError(
            "forward: the language model got one key-value cache and a decoder layer another; pass one to the model"
        )
