"""Phase one: the vision tower alone, on dense labels.

Every patch says what is there (shape, colour, digit), whether it is the middle of a thing, and its own row and column,
so that a language model can read places from features. The linear heads are thrown away afterwards. The class token
learns what is in the image, so that its attention means something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

from lab.training.loop import Clock, Optimiser, console, save
from lab.training.recipes import Recipe
from trio.measure.shapesvqa.questions import centre_patch
from trio.measure.shapesvqa.scenes import COLOURS, PLATES, SHAPES, Scene, Split, draw_scene

SHAPE_IDS = {name: i + 1 for i, name in enumerate((*SHAPES, "plate"))}
COLOUR_IDS = {name: i + 1 for i, name in enumerate((*COLOURS, *PLATES))}
GLYPHS = 21
IGNORE = -100


def dense_labels(scene: Scene, patch: int) -> dict[str, Tensor]:
    """What every patch should say: (rows, columns) of class numbers; and ``present``, what the image contains."""
    cover = scene.coverage(patch)
    top, share = cover.argmax(0), cover.max(0)
    shape_of = np.array([SHAPE_IDS[item.shape] for item in scene.items])
    colour_of = np.array([COLOUR_IDS[item.colour] for item in scene.items])
    solid, unclear = share >= 0.2, (share > 0.06) & (share < 0.2)
    shape = np.where(solid, shape_of[top], np.where(unclear, IGNORE, 0))
    colour = np.where(solid, colour_of[top], np.where(unclear, IGNORE, 0))

    rows, cols = shape.shape
    tiles = scene.glyph_map[: rows * patch, : cols * patch].reshape(rows, patch, cols, patch).transpose(0, 2, 1, 3)
    votes = np.stack([(tiles == g).mean((2, 3)) for g in range(1, GLYPHS)])
    glyph = np.where(votes.max(0) >= 0.25, votes.argmax(0) + 1, 0)

    centre = np.zeros_like(shape)
    present = np.zeros(len(SHAPE_IDS) + len(COLOUR_IDS), np.float32)
    for item in scene.items:
        centre[centre_patch(item, patch)] = 1
        present[SHAPE_IDS[item.shape] - 1] = 1
        present[len(SHAPE_IDS) + COLOUR_IDS[item.colour] - 1] = 1
    row, col = np.indices(shape.shape)
    found = {"shape": shape, "colour": colour, "glyph": glyph, "centre": centre, "row": row, "col": col}
    return {name: torch.from_numpy(np.asarray(v, np.int64)) for name, v in found.items()} | {
        "present": torch.from_numpy(present)
    }


def pixels(scene: Scene) -> Tensor:
    """The image as bytes: (3, height, width)."""
    return torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1)


def normalised(batch: Tensor) -> Tensor:
    """Bytes to what the image processor would give."""
    return (batch.float() / 255 - 0.5) / 0.25


class _Patches(Dataset[dict[str, Tensor]]):
    def __init__(self, recipe: Recipe, split: Split, seed: int, start: int, length: int) -> None:
        self.recipe, self.split, self.seed, self.start, self.length = recipe, split, seed, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = draw_scene(self.split, self.seed, self.start + index, self.recipe.size, self.recipe.cell)
        return {"pixels": pixels(scene)} | dense_labels(scene, self.recipe.patch)


PatchData = Callable[[Recipe, Split, int, int, int], Dataset[dict[str, Tensor]]]
"""Scenes with dense labels: of recipe, split, seed, number of the first scene, and how many."""


class DenseHeads(nn.Module):
    """Linear readers of the tower's features."""

    def __init__(self, width: int, grid: tuple[int, int] | None) -> None:
        """One head for each kind of label.

        Args:
            width: Width of the features.
            grid: Rows and columns of patches; None where features have no place of their own.
        """
        super().__init__()
        sizes = {
            "shape": len(SHAPE_IDS) + 1,
            "colour": len(COLOUR_IDS) + 1,
            "glyph": GLYPHS,
            "centre": 2,
        }
        if grid is not None:
            sizes |= {"row": grid[0], "col": grid[1]}
        self.norm = nn.LayerNorm(width)
        self.patch = nn.ModuleDict({name: nn.Linear(width, n) for name, n in sizes.items()})
        self.present = nn.Linear(width, len(SHAPE_IDS) + len(COLOUR_IDS))
        for name, light in (("shape", 0.15), ("colour", 0.15), ("glyph", 0.1), ("centre", 0.3)):
            weight = torch.ones(sizes[name])
            weight[0] = light  # most patches are background
            self.register_buffer(f"weight_{name}", weight)

    def forward(self, features: Tensor, cls: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and for each kind of label the accuracy where there is something."""
        features = self.norm(features).float()
        loss = F.binary_cross_entropy_with_logits(self.present(cls.float()), labels["present"])
        right: dict[str, float] = {}
        for name, head in self.patch.items():
            logits, wanted = head(features).flatten(0, 1), labels[name].flatten()
            weight = getattr(self, f"weight_{name}", None)
            loss = loss + F.cross_entropy(logits, wanted, weight, ignore_index=IGNORE)
            something = wanted > 0
            right[name] = (logits.argmax(-1) == wanted)[something].float().mean().item()
        return loss, right


def tower_output(model: LlavaForConditionalGeneration, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features as the projector sees them, and the class token after the last layer."""
    out = model.model.vision_tower(normalised(batch), output_hidden_states=True)
    return out.hidden_states[-2][:, 1:], out.last_hidden_state[:, 0]


@dataclass(frozen=True)
class Eyes:
    """What one tower does differently from another.

    Attributes:
        tower: The tower of a model and its layers, whose matrices Muon trains.
        heads: Linear readers of its features; called with features, class token and labels.
        see: Features (batch, patches, width) and class token (batch, width) of a batch.
    """

    tower: Callable[[Any], tuple[nn.Module, list[nn.Module]]]
    heads: Callable[[Recipe], nn.Module]
    see: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]]


def clip_tower(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The tower of the LLaVA family."""
    tower = model.model.vision_tower
    return tower, list(tower.encoder.layers)


def clip_heads(recipe: Recipe) -> DenseHeads:
    """Readers of its features."""
    return DenseHeads(recipe.tower_width, (recipe.size[1] // recipe.patch, recipe.size[0] // recipe.patch))


def train_tower(
    recipe: Recipe,
    model: Any,
    folder: Path,
    seed: int,
    clock: Clock,
    resume: bool,
    batch_size: int = 48,
    fresh: int = 480,
    patches: PatchData = _Patches,
    eyes: Eyes | None = None,
    rate: float = 3e-3,
    heads_first: int = 0,
) -> dict[str, float]:
    """Train ``model``'s vision tower in place; returns the accuracies on fresh scenes.

    A tower that was trained before needs a lower ``rate``, and ``heads_first``: so many steps for the new heads alone.
    """
    eyes = eyes or Eyes(clip_tower, clip_heads, lambda model, batch: tower_output(model, batch["pixels"]))
    tower, layers = eyes.tower(model)
    heads = eyes.heads(recipe)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in tower.parameters() if id(p) not in inside] + list(heads.parameters())
    optimiser = Optimiser(layers, rest, muon=rate, adam=rate)
    path = folder / "tower.pt"
    if resume and path.exists():
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        optimiser.restore(saved["optimiser"])
        clock.step, clock.spent = saved["step"], saved["minutes"]

    def checkpoint() -> None:
        content = {"tower": tower.state_dict(), "heads": heads.state_dict(), "optimiser": optimiser.state()}
        save(path, content | {"step": clock.step, "minutes": clock.elapsed})

    # one long data set a run; a resumed run goes on with the scenes that come next
    scenes = patches(recipe, "train", seed, clock.step * batch_size, 100_000_000)
    loader = DataLoader(scenes, batch_size, num_workers=1, prefetch_factor=8) if clock.progress < 1 else ()
    tower.train()
    for batch in loader:
        tower.requires_grad_(clock.step >= heads_first)
        with torch.autocast("cpu", torch.bfloat16):
            features, cls = eyes.see(model, batch)
        loss, right = heads(features, cls, batch)
        loss.backward()
        optimiser.step(clock.rate())
        clock.step += 1
        if clock.step % 50 == 0:
            accuracies = " ".join(f"{k} {v:.3f}" for k, v in right.items())
            console.print(f"tower step {clock.step} min {clock.elapsed:.1f} loss {loss.item():.3f} {accuracies}")
        if clock.step % 200 == 0:
            checkpoint()
        if clock.progress >= 1:
            break
    checkpoint()

    tower.eval()
    totals: dict[str, float] = {}
    unseen = DataLoader(patches(recipe, "validation", seed, 0, fresh), batch_size)
    with torch.no_grad():
        for batch in unseen:
            _, right = heads(*eyes.see(model, batch), batch)
            for name, value in right.items():
                totals[name] = totals.get(name, 0.0) + value / len(unseen)
    console.print("tower on fresh scenes:", totals)
    return totals
