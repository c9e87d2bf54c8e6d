"""Checkpoints to a folder that ``from_pretrained`` loads: ``python -m lab.training.export runs/tiny-llava DIR``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lab.training.families import FAMILIES, family_of
from lab.training.loop import console
from lab.training.recipes import Recipe


def _as_float32(config: object) -> None:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("dtype", "torch_dtype"):
                config[key] = "float32"
            _as_float32(value)


def export(recipe: Recipe, folder: Path, target: Path) -> None:
    """Write model and processor.

    The weights are stored in half precision, to be small; the configuration asks for float32, so that loading without
    a dtype computes in full precision.

    Args:
        recipe: The model's recipe.
        folder: Where ``tower.pt`` and ``language.pt`` are.
        target: The folder to write.
    """
    family = family_of(recipe)
    tokenizer = family.tokenizer()
    model: Any = family.model(recipe, tokenizer)
    tower = torch.load(folder / "tower.pt", weights_only=True)
    language = torch.load(folder / "language.pt", weights_only=True)
    vision, projector = family.parts(model)
    vision.load_state_dict(tower["tower"])
    model.model.language_model.load_state_dict(language["language"])
    projector.load_state_dict(language["projector"])
    with torch.no_grad():
        for name, parameter in model.model.named_parameters(recurse=False):
            parameter.copy_(language["extra"][name])
    model.lm_head.load_state_dict(language["head"])
    model.half().save_pretrained(target)
    family.processor(recipe, tokenizer).save_pretrained(target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    _as_float32(config)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    name: Annotated[str, typer.Option(help="Name in the zoo.")] = "tiny-llava",
) -> None:
    """Write the model of a training run, also of one that is still going on."""
    export(FAMILIES[name].recipe, folder, target)
    console.print(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
