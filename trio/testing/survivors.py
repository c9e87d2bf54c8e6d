"""Which columns a report says are there, and what a compressor left at them, read without the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, UnsupportedModelError
from .stock import entering, placeholders, valid_tokens

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..report import CompressionReport, ImageReport, SampleReport


@dataclass(frozen=True)
class Features:
    """What enters the first decoder layer in place of the stock model's own features, where a compressor merges.

    Attributes:
        hidden: ``(B, S, D)``, with the new features at the columns of the tokens that they stand for.
        merge_map: int64 ``(B, S)``, the column whose token each column's went into; itself where it stays, -1 where it
            was dropped. Features that the model adds between later layers are averaged over these members.
    """

    hidden: torch.Tensor
    merge_map: torch.Tensor


def kept_columns(
    model: nn.Module, adapter: Adapter, inputs: Mapping[str, Any], report: CompressionReport
) -> dict[int, torch.Tensor]:
    """The columns that a report says are there, by decoder layer, in the form that `masked_logits` takes.

    Newline tokens of tiled images stay while their row has a token (`newlines: with-row`, the default).

    Args:
        model: the model, no pipeline attached.
        adapter: of the model.
        inputs: those of the report, with or without more text behind them.
        report: of their prefill.

    Raises:
        InputError: the report is one of other inputs, or of another policy for newlines.
    """
    visual, valid = placeholders(adapter, inputs), valid_tokens(inputs)
    if len(report.samples) != len(visual):
        raise InputError(
            f"report: it has {len(report.samples)} samples, the inputs have {len(visual)}; pass the inputs that the "
            "report is about"
        )
    lines = torch.zeros_like(visual)
    if any(sample.newlines for sample in report.samples):
        lines = visual & _is_newline(adapter, entering(model, adapter, inputs))
    kept: dict[int, torch.Tensor] = {}
    for number, sample in enumerate(report.samples):
        tokens, ends = _columns(visual[number], lines[number], sample)
        for after, by_image, newlines in _steps(sample):
            stays = valid[number] & ~visual[number]
            for image, indices in enumerate(by_image):
                stays[[tokens[image][index] for index in indices]] = True
                for column, row in ends[image]:
                    stays[column] = bool(row & set(indices))
            rows_kept = int((stays & lines[number]).sum())
            if rows_kept != newlines:
                raise InputError(
                    f"report: sample {number} has {newlines} newline tokens from layer {after} on, but {rows_kept} "
                    "rows that still have a token; compare pipelines with newlines: with-row"
                )
            kept.setdefault(after, valid.clone())[number] = stays
    return dict(sorted(kept.items()))


def merged_features(
    model: nn.Module,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    report: CompressionReport,
    entered: torch.Tensor,
) -> Features:
    """The features that a compressor left, at their columns among the stock model's own.

    Args:
        model: the model, no pipeline attached.
        adapter: of the model.
        inputs: those of the report, with or without more text behind them.
        report: of their prefill.
        entered: ``(B, S', D)``, what entered the first decoder layer in that prefill, padded on the side of `inputs`.

    Raises:
        InputError: the report is one of other inputs.
        AssertionError: `entered` holds another number of tokens than the report says, or other text.
    """
    hidden = entering(model, adapter, inputs).clone()
    visual, lines = placeholders(adapter, inputs), torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if any(sample.newlines for sample in report.samples):
        lines = visual & _is_newline(adapter, hidden)
    start = kept_columns(model, adapter, inputs, report).get(0, valid_tokens(inputs))
    merge_map = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1).clone()
    for number, sample in enumerate(report.samples):
        columns = start[number].nonzero().squeeze(1)
        columns = columns[: report.layer_tokens[number][0]]  # text behind the prompt keeps the stock model's own
        rows = slice(0, len(columns)) if _padded_on_the_right(inputs) else slice(-len(columns), None)
        given = entered[number, rows].to(hidden)
        text = ~visual[number, columns]
        if len(given) != len(columns) or not torch.equal(given[text], hidden[number, columns[text]]):
            raise AssertionError(
                f"sample {number}: what entered the first decoder layer is not the text and the {len(columns)} tokens "
                "that the report says"
            )
        hidden[number, columns] = given
        if sample.compressor is None:
            continue
        tokens, _ = _columns(visual[number], lines[number], sample)
        for own, image in zip(tokens, sample.compressor.images, strict=True):
            for place, into in enumerate(image.merged):
                merge_map[number, own[place]] = own[into] if into >= 0 else -1
    return Features(hidden, merge_map)


def _padded_on_the_right(inputs: Mapping[str, Any]) -> bool:
    return not bool(valid_tokens(inputs)[:, -1].all())


def _is_newline(adapter: Adapter, hidden: torch.Tensor) -> torch.Tensor:
    """bool ``(B, S)``, True at the model's vector for the end of a row."""
    vector = getattr(adapter.multimodal, "image_newline", None)
    if not isinstance(vector, torch.Tensor):
        raise UnsupportedModelError(
            f"newlines: the report counts some, but {type(adapter.multimodal).__name__} has no image_newline to tell "
            "them by"
        )
    return (hidden == vector.detach().to(hidden)).all(-1)


def _columns(
    visual: torch.Tensor, lines: torch.Tensor, sample: SampleReport
) -> tuple[list[list[int]], list[list[tuple[int, set[int]]]]]:
    """For each image the columns of its tokens, and its newlines: column, and places of the tokens in its row."""
    columns = [(column, bool(lines[column])) for column in visual.nonzero().squeeze(1).tolist()]
    expected = sample.visual_tokens + sample.newlines
    if len(columns) != expected:
        raise InputError(
            f"report: sample {sample.sample} has {expected} visual tokens and newlines, the inputs have {len(columns)} "
            "placeholders; pass the inputs that the report is about"
        )
    tokens: list[list[int]] = []
    ends: list[list[tuple[int, set[int]]]] = []
    for image in sample.images:
        own: list[int] = []
        own_ends: list[tuple[int, set[int]]] = []
        while columns and (columns[0][1] or len(own) < image.tokens):
            column, newline = columns.pop(0)
            if newline:
                own_ends.append((column, set(range(len(own) - _width(image), len(own)))))
            else:
                own.append(column)
        tokens.append(own)
        ends.append(own_ends)
    return tokens, ends


def _width(image: ImageReport) -> int:
    """Tokens in a row that ends with a newline: a row of the tiles put together, or of the last frame."""
    return image.grids[-1][1]


def _steps(sample: SampleReport) -> Iterator[tuple[int, list[list[int]], int]]:
    """Drops in their order: layer, for each image the places of the tokens that are left, newlines that are left."""
    if sample.compressor is not None:
        yield 0, [image.indices for image in sample.compressor.images], sample.compressor.newlines
    for number, stage in enumerate(sample.stages):
        yield stage.after_layer, sample.kept_of_images(number), stage.newlines
