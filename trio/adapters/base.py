"""The interface of adapters: all that the framework must know about one family of models."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from ..core import upstream
from ..core.backbone import Backbone, PromptLayout, TinyModel
from ..core.patches import PatchMap
from ..core.probe import Head, LayerInputs, Past, Probe, Rows
from ..core.prompts import InputsFactory
from ..core.shape import ModelShape
from ..core.tokens import ImageTokens
from ..core.upstream import Role, Upstream
from ..errors import UnsupportedModelError
from ..registry import Registry
from .decoder_probe import Anatomy, LayerProbe, RowProbe, llama_like, take_positions, values_are_linear
from .quantised import advice, kind_of

if TYPE_CHECKING:
    from ..core.tokens import Signal
    from ..encoders.reading.reader import Reader

__all__ = ["ADAPTERS", "Adapter", "Positions", "PromptLayout"]

Positions = Literal["compact", "original"]


class Adapter(Backbone):
    """Finds the parts of a model and reads its calls; the only place that knows the family.

    A subclass says which models it takes (`matches`), where their modules are, and how a call's placeholders are laid
    out (`layout`). Everything else has defaults that fit models built from a stock text decoder.
    """

    #: Asked only where no other adapter takes a model.
    fallback: ClassVar[bool] = False
    #: Numbering of the survivors under ``positions: auto``, as the family's published code does it.
    default_positions: ClassVar[Positions] = "compact"
    #: Numberings that the family's rotary embeddings allow.
    allowed_positions: ClassVar[frozenset[Positions]] = frozenset({"compact", "original"})

    def __init__(self, model: nn.Module) -> None:
        """Binds the adapter to a model and checks its probes against the layers themselves (see `probe_kind`)."""
        self.model = model
        self._anatomies: dict[int, Anatomy | None] = {}
        self._slow: dict[int, str] = {}
        self._backwards: dict[int, str] = {}

    #: What tables call the families that it serves, by registered name or alias.
    labels: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter is made for the model."""

    #: `model_type` of the configurations that `cost_shape` describes.
    model_types: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def cost_shape(cls, config: Any) -> ModelShape:
        """What a model of such a configuration computes, without weights (`trio.cost.shape_of` asks for it).

        `trio.core.configs.model_shape` reads the decoder, `trio.encoders.towers.tower_shape` the tower; the matrices of
        the projector and the visual tokens of a crop are the family's own.

        Args:
            config: of the whole model, its type one of `model_types`.

        Raises:
            UnsupportedModelError: a number is missing, or decoder or tower are of a kind that is not described.
        """
        raise UnsupportedModelError(f"{cls.__name__} does not say what its models cost; write its `cost_shape`")

    #: Where the parts are, as paths below the model.
    multimodal_path: ClassVar[str] = "model"
    language_model_path: ClassVar[str] = "model.language_model"
    vision_tower_path: ClassVar[str] = "model.vision_tower"
    projector_path: ClassVar[str] = "model.multi_modal_projector"

    @property
    def multimodal(self) -> nn.Module:
        """The module that merges text and image features: it takes `input_ids` and calls the language model."""
        return self.model.get_submodule(self.multimodal_path)

    @property
    def language_model(self) -> nn.Module:
        """The text decoder: it takes `inputs_embeds` and owns the decoder layers."""
        return self.model.get_submodule(self.language_model_path)

    @property
    def vision_tower(self) -> nn.Module:
        """The image encoder."""
        return self.model.get_submodule(self.vision_tower_path)

    @property
    def projector(self) -> nn.Module:
        """The module between vision tower and language model."""
        return self.model.get_submodule(self.projector_path)

    @abstractmethod
    def layout(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> PromptLayout:
        """Where the visual tokens of a call of `multimodal` stand.

        Args:
            input_ids: int64 ``(B, S)``, on the CPU.
            encoded: by modality, the arguments of the last call of its encoder method (see `encoders`), None left out.

        Raises:
            InputError: the placeholders do not fit the images (a prompt cut within an image, for example).
        """

    def visual_tokens(self, input_ids: torch.Tensor, encoded: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """Visual tokens of each sample, newlines and other structure not counted; arguments as of `layout`."""
        layout = self.layout(input_ids, encoded)
        return [sum(int(image.is_visual.sum()) for image in images) for images in layout.images]

    def image_counts(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        """Visual tokens of each image of each prompt, from what a processor gives; nothing runs.

        Args:
            inputs: a batch with images, as `batch_for` makes it.
        """
        images = {name: value for name, value in inputs.items() if name not in ("input_ids", upstream.MASK)}
        layout = self.layout(inputs["input_ids"].cpu(), {"image": images})
        return [[int(image.is_visual.sum()) for image in row] for row in layout.images]

    #: The methods of `multimodal` that encode images, by the modality's name in ``mm_encoder_outputs``. Their
    #: arguments are noted while a pipeline is attached: `generate` may encode before the forward, which sees no grids.
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}
    #: Arguments of `multimodal` that hold pixels.
    pixels: ClassVar[tuple[str, ...]] = ("pixel_values",)

    #: How many visual tokens an image has: as many as its size in pixels gives (``by-size``), always as many
    #: (``one``), or by a rule that is not described.
    image_tokens: ClassVar[Literal["by-size", "one", "unknown"]] = "unknown"

    def brings_images(self, call: Mapping[str, Any]) -> bool:
        """Whether a call of `multimodal` brings images or features of images; looks at no tensor's content."""
        encoded = upstream.encoder_outputs(call)
        return any(call.get(name) is not None for name in self.pixels) or any(name in encoded for name in self.encoders)

    def later_features(
        self, arguments: Mapping[str, Any], after_layer: int
    ) -> tuple[dict[str, Any], dict[int, torch.Tensor]] | None:
        """Visual features that the language model adds between its layers, from a given depth on.

        Args:
            arguments: of the language model, by name.
            after_layer: decoder layers that run before tokens may be dropped.

        Returns:
            The arguments without the features that come at that depth or later, and those features, ``(n, D)`` for the
            n visual tokens of the batch in order, by the layer in front of which they are added. None where there are
            none (most families).
        """
        return None

    # A tiny random model of the same classes, on which the promises are tried where a release was not tested.

    @classmethod
    def tiny_config(cls, config: Any) -> Any | None:
        """A small copy of a model's configuration, of the same classes; None where none is known.

        ``type(model)(tiny)`` builds within a second, and takes sequences longer than any of its sliding windows.
        """
        return None

    @classmethod
    def tiny_inputs(cls, config: Any, dtype: torch.dtype = torch.float32) -> InputsFactory:
        """Makes batches for a model of such a configuration, by its `model_type`."""
        from .tiny_inputs import tiny_inputs

        return tiny_inputs(config, dtype)

    def tiny(self) -> TinyModel | None:
        """A tiny random model of the same classes; None where none is known. Draws from torch's random state."""
        from .tiny import placeholders

        config = self.tiny_config(self.model.config)
        if config is None:
            return None
        model: Any = type(self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(3.0)  # so that attention is far from uniform
        return TinyModel(type(self)(model.eval()), self.tiny_inputs(config), tuple(placeholders(config)))

    # The encoder side: what compressors need. An adapter without these serves compressors that read nothing off the
    # tower, and sees a tiled image as one.

    def patch_map(self, image: ImageTokens, number: int, arguments: Mapping[str, Any]) -> PatchMap | None:
        """Which patches of the tower the visual tokens of an image stand for; None: not known.

        Args:
            image: its tokens, without newlines.
            number: its place among the images of the last call of its encoder method.
            arguments: of that call.
        """
        return None

    def encoded_images(self, images: Sequence[ImageTokens], arguments: Mapping[str, Any]) -> int:
        """How many images the last call of an encoder method brought.

        Args:
            images: those that the prompts hold: as many, or a multiple where beam search repeats every sample.
            arguments: of the call.
        """
        return len(images)

    #: Whether tiled images come with the whole image in front of their tiles, and tiles at known places.
    whole_beside_tiles: ClassVar[bool] = False

    @property
    def reads_tower(self) -> bool:
        """Whether signals of the tower can be joined to the visual tokens."""
        return type(self).patch_map is not Adapter.patch_map

    @property
    def projected_blocks(self) -> tuple[int, ...]:
        """Blocks of the tower (counted from the end, -1 the last) whose outputs, side by side, the projector maps patch
        by patch; empty where it does anything else.
        """
        return ()

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """What the language model would see of rows of `projected_blocks`: ``(m, D_tower) -> (m, D)``."""
        out: torch.Tensor = self.projector(features)
        return out

    def tower_offers(self) -> frozenset[str]:
        """Kinds of signals that the vision tower offers (`Signal`); empty where it is not known."""
        from ..encoders.towers import tower_for

        if not self.reads_tower:
            return frozenset()
        try:
            return tower_for(self.vision_tower).offers()
        except UnsupportedModelError:
            return frozenset()

    def reader(self, signals: Sequence[Signal], *, keep: Callable[[int], int | None] | None = None) -> Reader:
        """A reader of the vision tower; `keep` as in `Reader`.

        Raises:
            UnsupportedModelError: the tower is not known, or does not offer a signal.
        """
        from ..encoders.reading.reader import Reader
        from ..encoders.towers import tower_for

        return Reader(tower_for(self.vision_tower), signals, keep=keep)

    @cached_property
    def upstream(self) -> Upstream:
        """How this release of transformers calls the model's parts.

        Raises:
            UnsupportedModelError: one of them is called in a way that is not known.
        """
        return Upstream.of(self.model, self.multimodal, self.language_model, self.layers)

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.language_model.config

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, first to last."""
        layers: Sequence[nn.Module] = self.language_model.layers  # type: ignore[assignment]  # nn.Module attribute
        return layers

    def logits(self, hidden: torch.Tensor, *, head: Head = "output") -> torch.Tensor:
        """Final norm and output head: ``(B, R, D) -> (B, R, vocabulary)``."""
        normed: torch.Tensor = self.language_model.norm(hidden)  # type: ignore[operator]  # nn.Module attribute
        if head == "input-embedding":
            return torch.nn.functional.linear(normed, self._embedding().weight)
        output = self.model.get_output_embeddings()  # type: ignore[operator]  # a method of every transformers model
        out: torch.Tensor = output(normed)
        return out

    def _embedding(self) -> Any:
        return self.model.get_input_embeddings()  # type: ignore[operator]  # a method of every transformers model

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Rotary embeddings as the decoder layers receive them, for positions ``(B, S)``."""
        return self.language_model.rotary_emb(hidden, positions)  # type: ignore[operator]  # nn.Module attribute

    def take_positions(self, embeddings: Any, index: torch.Tensor) -> Any:
        """Rotary embeddings of chosen columns, int64 ``(B, R)``."""
        return take_positions(embeddings, index)

    def anatomy(self, layer: int) -> Anatomy | None:
        """The submodules of a decoder layer, None where they are not known."""
        return llama_like(self.layers[layer])

    def window(self, layer: int) -> int | None:
        """The sliding window of a decoder layer in tokens, None for full attention."""
        attention: Any = getattr(self.layers[layer], "self_attn", None)
        if hasattr(attention, "sliding_window"):
            window = attention.sliding_window
            return None if window is None else int(window)
        config = self.text_config
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        # Without kinds of layers, a window in the configuration holds for all of them (Mistral).
        slides = window is not None and (kinds is None or kinds[layer] == "sliding_attention")
        return int(window) if slides and window is not None else None

    def probe(self, layer: int, inputs: LayerInputs) -> Probe:
        """The view into a decoder layer, bound to what enters it."""
        anatomy = self._checked_anatomy(layer)
        if anatomy is None:
            return LayerProbe(lambda given: self._run_layer(layer, given), inputs, self.logits)
        return RowProbe(anatomy, inputs, self.logits, self.window(layer))

    def probe_kind(self, layer: int) -> Literal["rows", "layer"]:
        """How a layer is probed: by rows where its anatomy is known and checked, else whole.

        The check runs the rows of a random input and compares them with the layer's own forward, once.
        """
        return "layer" if self._checked_anatomy(layer) is None else "rows"

    def offers(self, layer: int) -> frozenset[str]:
        """What scorers may need and this model gives at a decoder layer (see `Scorer.needs`)."""
        needs = ("objective", "attention-rows", "input-embedding")
        return frozenset(need for need in needs if not self.why_not(layer, need))

    def why_not(self, layer: int, need: str) -> str:
        """Why a decoder layer does not give what a scorer needs; empty where it does."""
        if need == "objective":
            return self._without_backward(layer)
        if need == "input-embedding":
            weight = getattr(self._embedding(), "weight", None)
            plain = isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()
            return "" if plain else "its input embedding holds no plain matrix of numbers"
        return self.why_whole(layer) if need == "attention-rows" else ""

    def why_whole(self, layer: int) -> str:
        """Why a layer is probed whole instead of by rows; empty where it is not."""
        self._checked_anatomy(layer)
        return self._slow[layer]

    def _checked_anatomy(self, layer: int) -> Anatomy | None:
        if layer not in self._anatomies:
            anatomy = self.anatomy(layer)
            reason = "its submodules are not the known ones" if anatomy is None else self._disagrees(layer, anatomy)
            self._slow[layer] = reason
            self._anatomies[layer] = None if anatomy is None or reason else self._with_values(layer, anatomy)
        return self._anatomies[layer]

    def _with_values(self, layer: int, anatomy: Anatomy) -> Anatomy:
        """The anatomy with what its value projection allows, tried on random tokens."""
        hidden = self._random_inputs(layer).hidden
        with torch.no_grad(), _without_autocast(hidden.device):
            return replace(anatomy, linear_values=values_are_linear(anatomy.value, anatomy.input_norm(hidden)))

    def _disagrees(self, layer: int, anatomy: Anatomy) -> str:
        """How the rows of a random input differ from the layer's own output; empty where they do not."""
        inputs = self._random_inputs(layer)
        hidden = inputs.hidden
        with torch.no_grad(), _without_autocast(hidden.device):
            index = torch.arange(hidden.shape[1], device=hidden.device)[None]
            rows = Rows(index, torch.ones_like(index, dtype=torch.bool))
            try:
                ours = RowProbe(anatomy, inputs, self.logits, self.window(layer)).output_rows(rows).float()
            except (RuntimeError, TypeError, AttributeError) as error:
                return f"its submodules have known names but another meaning ({_first_line(error)})"
            try:
                theirs = self._run_layer(layer, inputs).float()
            except (RuntimeError, TypeError, LookupError, ValueError, AttributeError) as error:
                return _cannot_run(error)
        if not bool(torch.isfinite(theirs).all()):
            return "its output on random tokens is not finite: its weights hold nan or inf, or overflow in their dtype"
        tolerance = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 3e-2
        off = float((ours - theirs).norm() / (theirs - hidden.float()).norm().clamp_min(1e-12))
        return "" if off < tolerance else f"its rows differ from its own output by {off:.1e}, allowed {tolerance:.0e}"

    def _without_backward(self, layer: int) -> str:
        """Why no gradients come through the layer: some quantised kernels have no backward, and would give zeros."""
        if layer not in self._backwards:
            inputs = self._random_inputs(layer)
            last = torch.full((1, 1), inputs.hidden.shape[1] - 1, device=inputs.hidden.device)
            rows = Rows(last, torch.ones_like(last, dtype=torch.bool))
            try:
                with _without_autocast(inputs.hidden.device):
                    gradient = self.probe(layer, inputs).saliency(rows)[0, :-1]
            except (RuntimeError, NotImplementedError) as error:
                self._backwards[layer] = self._blamed(layer, f"no gradient comes through it ({_first_line(error)})")
            except (TypeError, LookupError, ValueError, AttributeError) as error:
                self._backwards[layer] = _cannot_run(error)
            else:
                self._backwards[layer] = self._blamed(layer, _judged(gradient))
        return self._backwards[layer]

    def _blamed(self, layer: int, reason: str) -> str:
        """A reason for which a layer gives no gradient, with how its weights are quantised, where they are."""
        kind = kind_of(self.model, self.layers[layer]) if reason else ""
        if not kind:
            return reason
        anatomy = self.anatomy(layer)
        linear = anatomy is None or self._with_values(layer, anatomy).linear_values
        return f"{reason}; {advice(kind, as_they_come=not linear)}"

    def _random_inputs(self, layer: int) -> LayerInputs:
        """Hidden states of nine random tokens, where and as the layer takes them."""
        weight = next((p for p in self.layers[layer].parameters() if p.device.type != "meta"), None)
        # Weights that are offloaded are on meta while their layer does not run; a model may also be there as a whole.
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        nowhere = weight is None and all(tensor.device.type == "meta" for tensor in tensors)
        device = torch.device("meta" if nowhere else "cpu") if weight is None else weight.device
        own: Any = self.model.dtype
        dtype: torch.dtype = own if weight is None or not weight.is_floating_point() else weight.dtype
        length, width = 9, int(self.text_config.hidden_size)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, length, width, generator=generator).to(device, dtype)
        with torch.no_grad():
            return LayerInputs(
                hidden=hidden,
                valid=torch.ones(1, length, dtype=torch.bool, device=device),
                rotary=self.rotary(hidden, self._check_positions(length, device)),
            )

    def _check_positions(self, length: int, device: torch.device) -> torch.Tensor:
        """Position ids of a short text, in the form that `rotary` takes."""
        return torch.arange(length, device=device)[None]

    def _run_layer(self, layer: int, inputs: LayerInputs) -> torch.Tensor:
        """The layer's own forward on the given inputs, past the hooks on it."""
        valid, cache = inputs.valid, None
        if inputs.past is not None:
            valid = torch.cat([inputs.past.valid, valid], dim=1)
            cache = _one_layer_cache(layer, inputs.past)
        past = valid.shape[1] - inputs.valid.shape[1]
        window = self.window(layer)
        mask = upstream.causal_mask(self.text_config, inputs.hidden, valid, past=past, layer=layer, window=window)
        call = self.upstream.layers[layer]
        given: dict[str, Any] = {
            **inputs.others,
            call.hidden: inputs.hidden,
            call.mask: mask,
            call.rotary: inputs.rotary,
            call.cache: cache,
        }
        if Role.USE_CACHE in call.names:
            given[call.names[Role.USE_CACHE]] = cache is not None
        output = self.layers[layer].forward(**given)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


#: Adapters by name.
ADAPTERS: Registry[Adapter] = Registry("adapter", Adapter)


def _first_line(error: Exception) -> str:
    """An error's kind and what it says, on one line."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _cannot_run(error: Exception) -> str:
    return (
        f"called on a few random tokens as the decoder layers of known releases are called, it fails "
        f"({_first_line(error)}; transformers {upstream.version()}): report what `trio doctor` prints"
    )


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Weights are used in the dtype that they have; a device without autocast has nothing to turn off."""
    there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if there else nullcontext()


def _judged(gradient: torch.Tensor) -> str:
    """What is wrong with a gradient; empty where nothing is."""
    if not bool(torch.isfinite(gradient).all()):
        return "its gradient on random tokens is not finite: its weights hold nan or inf, or overflow in their dtype"
    return "" if bool((gradient > 0).any()) else "no gradient comes through it: a kernel without a backward gives zeros"


def _one_layer_cache(layer: int, past: Past) -> Any:
    """A cache that holds the past of one layer and nothing else."""
    cache = upstream.dynamic_cache()
    for index in range(layer + 1):
        held = slice(None) if index == layer else slice(0, 0)
        cache.update(past.keys[:, :, held], past.values[:, :, held], index)
    return cache
