"""Train a model of the zoo: ``python -m lab.training.train tiny-llava --out runs/tiny-llava``.

Two phases, each resumable: the vision tower alone on dense labels, then, with the tower frozen, the projector and the
language model on questions; a model that grows out of another starts from its weights. Trained end to end, a young
language model's gradients spoil the tower. The finished model is written to ``OUT/model``, as a folder that
``from_pretrained`` loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from lab.training.export import export
from lab.training.families import FAMILIES
from lab.training.language import train_language
from lab.training.loop import Clock, console, save
from lab.training.tower import train_tower


def main(
    name: Annotated[str, typer.Argument(help="Name in the zoo.")] = "tiny-llava",
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the model; default runs/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and scenes; default: the model's own.")] = None,
    phase: Annotated[str, typer.Option(help="tower, language or both.")] = "both",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes for the language phase (with --phase tower: the tower).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps for it instead of minutes; repeatable on one machine.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in the folder.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="Compile the layers: a fifth faster, needs a C++ compiler.")
    ] = False,
) -> None:
    """Train a model of the zoo."""
    if name not in FAMILIES:
        raise typer.BadParameter(f"no recipe {name!r}; there are: {', '.join(FAMILIES)}")
    if phase not in ("tower", "language", "both"):
        raise typer.BadParameter(f"--phase is tower, language or both, not {phase!r}")
    if phase == "tower" and FAMILIES[name].tower is None:
        raise typer.BadParameter(f"--phase tower: {name} keeps the tower of {FAMILIES[name].source}")
    torch.set_num_threads(threads)
    family, out = FAMILIES[name], out or Path("runs") / name
    recipe, tokenizer = family.recipe, family.tokenizer()
    seed = recipe.seed if seed is None else seed
    torch.manual_seed(seed)
    model = family.model(recipe, tokenizer)
    if family.warm_start:
        family.warm_start(model)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "training.json"
    facts = json.loads(log.read_text()) if log.exists() else {}
    if family.source:
        facts["start"] = family.source
    if family.tower is None:
        save(out / "tower.pt", {"tower": family.parts(model)[0].state_dict()})
    elif phase != "language":
        own = phase == "tower"
        clock = Clock(None if own and steps else (own and minutes) or recipe.tower_minutes, steps if own else None)
        accuracy = train_tower(recipe, model, out, seed, clock, resume, **family.tower)
        facts["tower"] = {"minutes": round(clock.elapsed, 1), "steps": clock.step, "accuracy": accuracy}
        facts["tower"]["batch"] = family.tower.get("batch_size", 48)
        log.write_text(json.dumps(facts, indent=2))
    if phase != "tower":
        saved = torch.load(out / "tower.pt", weights_only=True)
        family.parts(model)[0].load_state_dict(saved["tower"])
        clock = Clock(None if steps else minutes or recipe.language_minutes, steps)
        curve = train_language(
            recipe,
            model,
            tokenizer,
            out,
            seed,
            clock,
            resume,
            compile_layers,
            grown=family.grown,
            parts=family.parts,
            **family.language,
        )
        facts["language"] = {"minutes": round(clock.elapsed, 1), "steps": clock.step, "curve": curve}
        facts["language"]["batch"] = family.language.get("batch_size", 16)
        log.write_text(json.dumps(facts, indent=2))
        export(recipe, out, out / "model")
    console.print(f"finished: {out}")


if __name__ == "__main__":
    typer.run(main)
