"""What the promises share: runs of a model, stock and compressed, and comparisons with numbers in their messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..adapters.base import Adapter
from ..core import upstream
from ..core.prompts import Inputs, InputsFactory, Prompt, Side
from ..core.upstream import Role
from ..pipeline import Pipeline
from ..report import CompressionReport
from .results import require

#: Kept tokens by stage, sample and image.
Selection = list[list[list[list[int]]]]

#: Two stages that fit every model of four or more layers.
TWO_STAGES: tuple[Mapping[str, Any], ...] = (
    {"after_layer": "25%", "keep": "50%"},
    {"after_layer": "50%", "keep": "25%"},
)
AT_INPUT: tuple[Mapping[str, Any], ...] = ({"after_layer": 0, "keep": "25%"},)

ONE = Prompt("What is in the picture", 1, "and where does it stand ?")
TWO = Prompt("Compare", 2, "with", 3, "please")
TEXT = Prompt("No picture at all , only a question about the weather in the north")
END = Prompt("Look at this long introduction before the picture comes at the very end :", 4)
RAGGED = (ONE, TWO, TEXT, END)

#: New tokens where generation is compared.
NEW = 4
#: Settings of a checkpoint's own that would change which tokens come out or their scores.
PLAIN: Mapping[str, Any] = {"repetition_penalty": 1.0, "length_penalty": 1.0, "renormalize_logits": False}


@dataclass(frozen=True)
class Setting:
    """One way of compressing that a promise is checked with."""

    label: str
    stages: Sequence[Any]
    positions: Literal["auto", "compact", "original"] = "original"
    compressor: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Bench:
    """A model, inputs for it, and what counts as equal.

    Attributes:
        model: the model that users call (or a PEFT wrapper around it).
        factory: makes inputs.
        adapter: of the model.
        tolerance: largest difference of logits, relative to the largest logit.
        exact: whether kept tokens must be the same ones, all of them; else 95% of them, or all but two.
        settings: the first is used where one is enough.
        attention: names of attention implementations to compare.
    """

    model: Any
    factory: InputsFactory
    adapter: Adapter
    tolerance: float
    exact: bool
    settings: tuple[Setting, ...]
    attention: tuple[str, ...]

    # Running

    @property
    def inner(self) -> nn.Module:
        """The transformers model, without a wrapper."""
        return self.adapter.model

    def inputs(self, *prompts: Prompt, side: Side = "left") -> Inputs:
        """A batch on the model's device, its floating-point tensors in the model's dtype."""
        device, dtype = self.model.device, self.model.dtype
        made = self.factory(prompts, side=side)
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in made.items()
            if isinstance(value, torch.Tensor)
        }

    def pipeline(self, setting: Setting | None = None, *, report: Literal["counts", "full"] = "counts") -> Pipeline:
        """A pipeline on the model."""
        setting = setting or self.settings[0]
        return Pipeline(
            self.inner,
            stages=setting.stages,
            compressor=setting.compressor,
            positions=setting.positions,
            name="trio.testing",
            adapter=self.adapter,
            report=report,
        )

    def forward(self, inputs: Mapping[str, Any], **more: Any) -> torch.Tensor:
        """Logits ``(B, S', vocabulary)`` of one forward without a cache."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(**{**inputs, **upstream.keywords({Role.USE_CACHE: False}), **more}).logits
        return logits

    def generate(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        """What `generate` gives for `NEW` greedy tokens, with logits; `more` overrides."""
        given: dict[str, Any] = {
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **PLAIN,
            "suppress_tokens": self._placeholders() or None,
            **more,
        }
        return self.model.generate(**inputs, **given)

    def _placeholders(self) -> list[int]:
        """Tokens that stand for images: one pass over an answer that holds some would look for more images."""
        config = self.inner.config
        names = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id")
        return sorted({token for name in names if isinstance(token := getattr(config, name, None), int)})

    # Comparing

    def close(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> float:
        """The largest difference relative to the largest expected logit.

        Raises:
            AssertionError: it is above the tolerance, or the shapes differ.
        """
        require(actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
        require(bool(torch.isfinite(actual).all()), f"{what}: logits are not finite")
        error = relative(actual, expected)
        require(
            error <= self.tolerance,
            f"{what}: logits differ by {error:.2e} of the largest, allowed {self.tolerance:.0e}",
        )
        return error

    def same_tokens(self, actual: Selection, expected: Selection, what: str) -> float:
        """The share of kept tokens that two selections have in common.

        Raises:
            AssertionError: it is not all of them (in half precision: of 95%, or all but two).
        """
        common = total = 0
        for ours, theirs in zip(_images(actual), _images(expected), strict=True):
            require(
                self.exact is False or len(ours) == len(theirs), f"{what}: kept {len(ours)} and {len(theirs)} tokens"
            )
            common += len(ours & theirs)
            total += max(len(ours), len(theirs))
        share = common / total if total else 1.0
        # Half precision breaks ties within its rounding: a few swaps, which the next stages inherit.
        allowed = 0 if self.exact else max(2, total // 20)
        message = f"{what}: {total - common} of {total} kept tokens are others, at most {allowed} expected"
        require(total - common <= allowed, message)
        return share

    def last(self, logits: torch.Tensor, inputs: Inputs, side: Side, report: CompressionReport | None) -> torch.Tensor:
        """Each sample's logits at its last valid token, ``(B, vocabulary)``."""
        if side == "left":
            return logits[:, -1]
        if report is None:
            ends = inputs[upstream.MASK].sum(1) - 1
        else:
            ends = torch.tensor([tokens[-1] - 1 for tokens in report.layer_tokens])
        return logits[torch.arange(logits.shape[0]), ends.to(logits.device)]

    def follows_replay(
        self, pipeline: Pipeline | None, prompts: Sequence[Prompt], out: Any, selection: Selection
    ) -> float:
        """Whether every step's logits equal one pass without a cache that replays the recorded indices.

        Args:
            pipeline: attached or not; None for the stock model, which has nothing to replay.
            prompts: of the batch, padded on the left.
            out: what `generate` gave, with `sequences` and `logits`; several sequences a prompt are fine.
            selection: recorded at the batch's prefill.

        Returns:
            The largest error.
        """
        steps = torch.stack(out.logits, dim=1)  # (rows, steps, vocabulary)
        rows = steps.shape[0]
        worst = 0.0
        for row in range(rows):
            logits = self.replayed(pipeline, prompts, out.sequences, row, selection)
            expected = logits[:, -steps.shape[1] :]
            worst = max(worst, self.close(steps[row : row + 1], expected, f"sequence {row} of {rows}"))
        return worst

    def replayed(
        self,
        pipeline: Pipeline | None,
        prompts: Sequence[Prompt],
        sequences: torch.Tensor,
        row: int,
        selection: Selection,
    ) -> torch.Tensor:
        """Logits ``(1, S', vocabulary)`` of one returned sequence alone, in one pass that replays the indices.

        The last token of the sequence is left out: nothing was predicted from it.
        """
        sample = row // (sequences.shape[0] // len(prompts))
        inputs = self.inputs(prompts[sample])
        length = inputs["input_ids"].shape[1]
        padding = self.inputs(*prompts)["input_ids"].shape[1] - length
        inputs = extended(inputs, sequences[row : row + 1, padding:-1])
        if pipeline is None:
            return self.forward(inputs)
        with pipeline.replay([[by_sample[sample]] for by_sample in selection]):
            return self.forward(inputs)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    largest = expected.float().abs().max().clamp_min(1e-12)
    return float((actual.float() - expected.float()).abs().max() / largest)


def kept_by_all(report: CompressionReport) -> Selection:
    """What the compressor left, as though it were a first stage, and what each stage kept."""
    compressed = [
        [image.indices for image in sample.compressor.images]
        if sample.compressor is not None
        else [list(range(image.tokens)) for image in sample.images]
        for sample in report.samples
    ]
    return [compressed, *report.selection()]


def _images(selection: Selection) -> Iterator[set[int]]:
    for by_sample in selection:
        for by_image in by_sample:
            for indices in by_image:
                yield set(indices)


def extended(inputs: Inputs, ids: torch.Tensor) -> Inputs:
    """The inputs with more text at the end: `ids` ``(B, S')`` begin with the inputs' own."""
    shape = inputs["input_ids"].shape
    more = ids.shape[1] - shape[1]
    out = {}
    for name, value in inputs.items():
        if name == "input_ids":
            out[name] = ids
        elif value.shape == shape:
            filling = value.new_full((shape[0], more), int(name == upstream.MASK))
            out[name] = torch.cat([value, filling], dim=1)
        else:
            out[name] = value
    return out


def joined(first: Inputs, second: Inputs) -> Inputs:
    """One conversation from two turns of one sample: texts one after the other, and all images."""
    out = {}
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            out[name] = (first if name in first else second)[name]
        else:
            by_token = first[name].shape == first["input_ids"].shape
            pair = [first[name], second[name]] if by_token else _even([first[name], second[name]])
            out[name] = torch.cat(pair, dim=1 if by_token else 0)
    return out


def _even(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of images with equally many tiles, filled up with zeros as processors do."""
    if images[0].ndim < 3:
        return images
    most = max(tensor.shape[1] for tensor in images)
    return [
        torch.cat([tensor, tensor.new_zeros(len(tensor), most - tensor.shape[1], *tensor.shape[2:])], dim=1)
        for tensor in images
    ]


def image_inputs(inputs: Inputs) -> set[str]:
    """Names of the inputs that belong to images, not to tokens."""
    return {name for name, value in inputs.items() if value.shape != inputs["input_ids"].shape}


def reduced(report: CompressionReport) -> CompressionReport:
    """The report itself.

    Raises:
        AssertionError: nothing was dropped, so that a promise would be kept by doing nothing.
    """
    require(report.retention < 1, "no visual token was dropped: the check would mean nothing")
    return report


@contextmanager
def attention_of(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another attention implementation for the block, then with those that it had.

    Raises:
        ValueError: the model does not take it.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]  # a method of every transformers model
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
