"""TRIO as its released code builds it, for comparison: the whole layer and the output head, forward and backward.

Written from the description of the method (arXiv 2602.04657), not from the authors' files: at a stage the next
decoder layer, the final norm and the head run on every row with autograd on; the loss is read at the last rows, and
its gradient goes back through all of it. The suppression computes all similarities and visits tokens in a Python
loop. What is kept differs from `trio`'s in ties at most; what is measured is the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

import trio
from trio.adapters.base import Adapter
from trio.core.context import LayerContext, SelectionContext
from trio.core.probe import LayerInputs
from trio.measure.bench.timing import TimedWay, run
from trio.measure.bench.ways import Entry, Maker
from trio.spec import PipelineSpec

ROWS = 4


class WholeLayer(trio.Scorer):
    """The gradient of the self-supervised loss through a whole layer and the head on every row.

    Parameters:
        adapter: of the model.
        rows: supervised rows at the end of the prompt.
    """

    needs = frozenset({"objective"})
    adapter: Any
    rows: int = ROWS

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`."""
        adapter: Adapter = self.adapter
        rotary = ctx.probe("next").inputs.rotary
        with torch.inference_mode(False), torch.enable_grad():
            hidden = ctx.hidden.detach().clone().requires_grad_()
            inputs = LayerInputs(hidden=hidden, valid=ctx.valid, rotary=rotary)
            logits = adapter.logits(adapter._run_layer(ctx.after_layer, inputs)).float()
            labels = logits.argmax(-1)
            last = logits[:, -self.rows :]
            loss = F.cross_entropy(last.flatten(0, 1), labels[:, -self.rows :].flatten())
            (gradient,) = torch.autograd.grad(loss * 1024, hidden)
        return ctx.at_visual(gradient.float().norm(dim=-1))


class LoopNMS(trio.Selector):
    """Greedy suppression from all similarities, one token after the other.

    Parameters:
        threshold: cosine similarity from which on a token counts as a duplicate.
    """

    threshold: float = 0.8

    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Selector.select`."""
        most = int(ctx.k.max())
        indices = torch.zeros(len(ctx.k), most, dtype=torch.int64, device=ctx.saliency.device)
        for group, count in enumerate(ctx.k.tolist()):
            unit = F.normalize(ctx.features[group].float(), dim=-1)
            near = unit @ unit.T >= self.threshold
            order = ctx.saliency[group].argsort(descending=True)
            gone = ~ctx.valid[group]
            kept: list[int] = []
            for token in order.tolist():
                if len(kept) == count:
                    break
                if not gone[token]:
                    kept.append(token)
                    gone = gone | near[token]
            taken = set(kept)
            rest = [token for token in order.tolist() if token not in taken and ctx.valid[group, token]]
            chosen = sorted([*kept, *rest[: count - len(kept)]])
            indices[group, :count] = torch.tensor(chosen, device=indices.device)
        return indices, torch.arange(most, device=indices.device) < ctx.k.to(indices.device)[:, None]


def naive(maker: Maker, specs: Sequence[PipelineSpec]) -> list[Entry]:
    """A row for each spec that has stages alone: the same counts at the same layers, built naively."""
    made = []
    model: Any = maker.adapter.model
    scorer, selector = WholeLayer(adapter=maker.adapter), LoopNMS()
    for spec in specs:
        if spec.compressor is not None:
            continue
        stages = [
            trio.Stage(
                after_layer=stage.after_layer,
                keep=stage.keep,
                if_fewer=stage.if_fewer,
                scorer=scorer,
                selector=selector,
            )
            for stage in spec.stages
        ]
        pipeline = trio.Pipeline(
            model, stages=stages, budget=spec.budget, positions=spec.positions, name=spec.name, adapter=maker.adapter
        )
        with pipeline:
            run(model, maker.inputs, 0)
        way = TimedWay(f"naive {spec.name}", maker.inputs, _attaching(pipeline), maker.steps)
        kept = pipeline.report.average_kept / maker.samples
        made.append(Entry(way, "naive", spec.name, maker.visual, kept))
    return made


def _attaching(pipeline: trio.Pipeline) -> Callable[[], trio.Pipeline]:
    return lambda: pipeline
