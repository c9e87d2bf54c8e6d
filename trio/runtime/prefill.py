"""The start of a forward that brings visual tokens: where they stand, and which of them are given instead of scored."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..core.backbone import Backbone
from ..core.transfer import HostValues
from ..core.upstream import Role, encoder_outputs
from ..errors import InputError
from .encoded import tiles_of
from .forward import Forward, Prefill
from .record import PrefillRecord
from .state import Images, NewlinePolicy, start

#: Tokens to keep, as a user gives them: by stage, sample and image, numbers of the image's own tokens.
Selection = Sequence[Sequence[Sequence[Sequence[int]]]]


def start_prefill(
    backbone: Backbone,
    forward: Forward,
    hidden: torch.Tensor,
    encoded: Mapping[str, Mapping[str, Any]],
    newlines: NewlinePolicy,
) -> Prefill | None:
    """Lays out the visual tokens of a forward.

    Args:
        backbone: the model, through its adapter.
        forward: the running forward, its mask known.
        hidden: ``(B, S, D)``, the embeddings that enter the language model.
        encoded: arguments of the last calls of the encoder methods, by modality.
        newlines: what happens to tokens that end the rows of an image.

    Returns:
        None where no sample has an image.

    Raises:
        InputError: the placeholders do not fit the images, the mask does not fit the ids, or a sample is all padding.
    """
    here = forward.modalities | set(encoder_outputs(forward.call))
    used: Mapping[str, Mapping[str, Any]] = {name: encoded[name] for name in here if name in encoded}
    ids = backbone.upstream.multimodal.read(Role.IDS, forward.call)
    ids, valid, used = _on_host(forward.looked or HostValues(), ids, forward.mask, used)
    _check_samples(valid)
    layout = backbone.layout(ids, used)
    if not any(layout.images):
        return None
    host, images = start(layout.visual & valid, valid, layout.images, newlines)
    state = host.to(hidden.device)
    modalities = layout.modalities or tuple(("image",) * len(row) for row in layout.images)
    return Prefill(
        record=PrefillRecord(
            images=images,
            valid=valid,
            newlines=() if state.newlines is None else state.newlines.counts,
        ),
        state=state,
        host=None if host is state else host,
        input_ids=ids,
        seeds=tuple(_seed(row[there]) for row, there in zip(ids, valid, strict=True)),
        num_layers=len(backbone.layers),
        modalities=modalities,
        encoded=used,
        find_tiles=partial(tiles_of, backbone, images, modalities, used),
    )


def _on_host(
    looked: HostValues, ids: torch.Tensor, mask: torch.Tensor | None, encoded: Mapping[str, Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, dict[str, Any]]]:
    """All that the host must know of a forward: here it waits for the device, for what it has not looked at before.

    Args:
        looked: what it has looked at.
        ids: int ``(B, S)``.
        mask: of the whole conversation, ``(B, past + S)``, or None.
        encoded: by modality, arguments of the encoder methods.

    Returns:
        Ids and padding, int64 and bool ``(B, S)`` on the CPU, and the arguments, sizes and grids among them on the CPU.

    Raises:
        InputError: the mask does not fit the ids.
    """
    batch, length = ids.shape
    if mask is not None and (mask.shape[0] != batch or mask.shape[1] < length):
        raise InputError(
            f"mask: found {tuple(mask.shape)} (batch, length), the forward brings {batch} samples of {length} tokens; "
            "pass the mask that the processor made with the ids, with ones in front for the tokens of earlier turns"
        )
    numbers: dict[tuple[str, str], torch.Tensor] = {
        (modality, name): value
        for modality, arguments in encoded.items()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and value.device.type != "cpu"
    }
    masks = [] if mask is None else [mask]
    host = looked.look([ids, *masks, *numbers.values()])
    present = host[1][:, -length:].bool() if masks else torch.ones_like(host[0], dtype=torch.bool)
    known = dict(zip(numbers, host[1 + len(masks) :], strict=True))
    copied = {
        modality: {name: known.get((modality, name), value) for name, value in arguments.items()}
        for modality, arguments in encoded.items()
    }
    return host[0], present, copied


def _check_samples(valid: torch.Tensor) -> None:
    """Refuses a sample without any token, from bool ``(B, S)`` on the CPU."""
    empty = [sample for sample, tokens in enumerate(valid.sum(1).tolist()) if not tokens]
    if empty:
        raise InputError(
            f"mask: sample {empty[0]} has no token that is not padding; pass 1 at every token of the prompt"
        )


def _seed(ids: torch.Tensor) -> int:
    """One number for a prompt, from its tokens without padding: the same in any batch."""
    return zlib.crc32(ids.to(torch.int64).numpy().tobytes())


def given_tokens(selection: Selection, images: Images, stages: Sequence[int]) -> dict[int, torch.Tensor]:
    """A user's selection as masks over the tokens at the start."""
    if len(selection) != len(stages):
        raise InputError(f"replay: found indices for {len(selection)} stages, the pipeline has {len(stages)}")
    most = max(sum(image.tokens for image in sample) for sample in images)
    masks = {}
    for number, by_sample in zip(sorted(stages), selection, strict=True):
        mask = torch.zeros(len(images), most, dtype=torch.bool)
        if len(by_sample) != len(images):
            raise InputError(f"replay: found indices for {len(by_sample)} samples, the forward brings {len(images)}")
        for sample, by_image in enumerate(by_sample):
            if len(by_image) != len(images[sample]):
                raise InputError(
                    f"replay: sample {sample}: found indices for {len(by_image)} images, it has {len(images[sample])}"
                )
            first = 0
            for image, indices in zip(images[sample], by_image, strict=True):
                chosen = torch.as_tensor(indices, dtype=torch.int64)
                if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < image.tokens):
                    raise InputError(
                        f"replay: sample {sample}: indices must lie between 0 and {image.tokens - 1}, found "
                        f"{int(chosen.min())} to {int(chosen.max())}"
                    )
                mask[sample, first + chosen] = True
                first += image.tokens
        masks[number] = mask
    return masks
