"""`trio export-embeds`: compressed image embeddings, for engines that take them in place of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OUT, Device, DType, DTypeName, Force, Json, ModelArgument


def export_embeds(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    spec: Annotated[
        str, typer.Option("--spec", "-s", help="A compressor with a count (divprune-64), a shipped spec or a file.")
    ],
    out: Annotated[Path, typer.Option(*OUT, help="Folder; each image becomes NAME.safetensors in it.")],
    force: Force = False,
    as_json: Json = False,
    dtype: DTypeName = DType.auto,
    device: Device = "auto",
) -> None:
    """Write the image_embeds that stock vLLM takes, compressed by a spec (LLaVA-1.5, LLaVA-NeXT)."""
    from safetensors.torch import save_file

    from ..errors import InputError
    from ..integrations.embeddings import export_embeddings
    from .common import check_outputs, load_image, load_model, print_json, say

    targets = [out / f"{image.stem}.safetensors" for image in images]
    twice = sorted({target.name for target in targets if targets.count(target) > 1})
    if twice:
        raise InputError(f"images: several would become {', '.join(twice)}; give images of different names.")
    out.mkdir(parents=True, exist_ok=True)
    check_outputs({f"--out {target.name}": target for target in targets}, force=force)
    loaded = [load_image(image) for image in images]
    network, processor = load_model(model, dtype=dtype.value, device=device)
    rows = export_embeddings(network, processor, loaded, spec)
    for target, embeddings in zip(targets, rows, strict=True):
        partial = target.with_name(target.name + ".partial")  # whole or not at all
        save_file({"image_embeds": embeddings}, partial, metadata={"spec": spec, "model": model})
        partial.replace(target)
    if as_json:
        print_json(
            [{"file": str(t), "tokens": len(r), "width": r.shape[1]} for t, r in zip(targets, rows, strict=True)]
        )
        return
    for target, embeddings in zip(targets, rows, strict=True):
        say(f"{target}: {embeddings.shape[0]} tokens")
