"""What both phases of training share: optimisers, the schedule of learning rates, resumable checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

console = Console(highlight=False)


@dataclass
class Clock:
    """How far training is, by steps or by minutes, over all runs that resumed it.

    Attributes:
        minutes: Planned minutes, or None.
        steps: Planned steps, or None.
        step: Steps done.
        spent: Minutes spent in earlier runs.
    """

    minutes: float | None
    steps: int | None
    step: int = 0
    spent: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Minutes of training so far."""
        return self.spent + (time.monotonic() - self._start) / 60

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        parts = [self.elapsed / self.minutes if self.minutes else 0.0, self.step / self.steps if self.steps else 0.0]
        return min(1.0, max(parts))

    def rate(self, warm_up: int = 50, decay_from: float = 0.5) -> float:
        """Factor of the learning rate: a short warm-up, then constant, then straight down to almost zero."""
        up = min(1.0, (self.step + 1) / warm_up)
        down = min(1.0, (1 - self.progress) / (1 - decay_from))
        return max(0.01, up * down)


class Optimiser:
    """Muon for the matrices inside the layers, AdamW for everything else."""

    def __init__(self, modules: Iterable[nn.Module], rest: Iterable[nn.Parameter], muon: float, adam: float) -> None:
        """Split the parameters.

        Args:
            modules: Layers, whose matrices go to Muon and whose vectors go to AdamW.
            rest: Parameters for AdamW.
            muon: Learning rate of Muon, scaled to match the updates of AdamW.
            adam: Learning rate of AdamW.
        """
        parameters = [p for module in modules for p in module.parameters()]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2] + list(rest)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base = (muon, adam)
        self.parameters = matrices + others

    def step(self, factor: float) -> None:
        """One update with all learning rates times ``factor``; clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, base in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = base * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [part.state_dict() for part in self.parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """From a checkpoint."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def forever(loader_of: Any, start: int) -> Iterator[Any]:
    """Batches without end: ``loader_of(first_index)`` gives a fresh loader from an index on."""
    while True:
        for batch in loader_of(start):
            yield batch
            start += 1
