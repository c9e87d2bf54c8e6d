"""`check_scorer`: what every scorer must do, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from ..core.context import LayerContext
from ..core.prompts import InputsFactory, Prompt
from ..pipeline import Pipeline
from ..scorers.base import SCORERS, Scorer
from ..spec import StageSpec
from .bench import END, ONE, RAGGED, TWO
from .inputs import as_factory
from .results import Case, CheckResults, require, run_cases
from .tiny import TokenInputs, tiny_llava

#: Largest difference of a sample's saliencies alone and in a batch, relative to its largest one.
CLOSE = 1e-4


def check_scorer(
    scorer: Scorer | type[Scorer] | str,
    *,
    model: Any = None,
    inputs: InputsFactory | Any = None,
    raise_on_failure: bool = True,
) -> CheckResults:
    """Checks a scorer: shapes, padding, determinism, batches, and that it leaves alone what it only reads.

    Args:
        scorer: an object, a class or a registered name.
        model: in float32, in place of a tiny LLaVA with random weights.
        inputs: for `model`: its processor or an `InputsFactory`.
        raise_on_failure: whether to raise where a check does not hold.

    Returns:
        Every check with its numbers.

    Raises:
        AssertionError: a check does not hold.
    """
    part: Scorer = SCORERS.build(scorer)
    factory = TokenInputs() if inputs is None else as_factory(inputs)
    suite = _Suite(part, tiny_llava() if model is None else model, factory, own_model=model is None)
    results = CheckResults(f"scorer {part!r}", tuple(run_cases("scorer", suite.cases())))
    return results.raise_if_failed() if raise_on_failure else results


class _Watched(Scorer):
    """Passes on to a scorer and notes what goes in and out."""

    needs: ClassVar[frozenset[str]] = frozenset()

    scorer: Scorer
    notes: list[tuple[LayerContext, torch.Tensor]] = Field(default_factory=list)
    twice: bool = False

    def required(self) -> frozenset[str]:
        return self.scorer.required()

    def score(self, ctx: LayerContext) -> torch.Tensor:
        before = {name: value.clone() for name, value in _tensors(ctx).items()}
        out = self.scorer.score(ctx)
        require(isinstance(out, torch.Tensor), f"found a {type(out).__name__}, expected a tensor")
        shape = ctx.visual_index.shape
        require(out.shape == shape, f"shape {tuple(out.shape)}, expected {tuple(shape)}")
        for name, value in _tensors(ctx).items():
            same = torch.equal(torch.nan_to_num(value), torch.nan_to_num(before[name]))
            require(same, f"ctx.{name} was changed; a scorer only reads")
        if self.twice:
            require(torch.equal(out, self.scorer.score(ctx)), "called twice on the same context, it gave other numbers")
        self.notes.append((ctx, out))
        return out


def _tensors(ctx: LayerContext) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(ctx, field.name) for field in fields(ctx)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


class _Suite:
    def __init__(self, scorer: Scorer, model: Any, factory: InputsFactory, *, own_model: bool) -> None:
        self.scorer = scorer
        self.model = model
        self.factory = factory
        self.own_model = own_model

    def cases(self) -> Iterator[Case]:
        yield "parameters round trip", self._parameters
        yield "shape, dtype, padding, reads only", partial(self._form, 2)
        if not self.scorer.required() & {"ran", "last"}:
            yield "at the input of the language model", partial(self._form, 0)
        yield "the same numbers when called again", self._deterministic
        yield "a batch scores as its samples alone", self._singles
        yield "the order of the batch does not matter", self._permuted
        yield "padding on the other side does not matter", self._sides
        for name, mode in (("torch.no_grad", torch.no_grad), ("torch.inference_mode", torch.inference_mode)):
            yield name, partial(self._mode, mode)
        yield "within generate", self._generate
        if self.own_model:
            yield "bfloat16", self._half

    def _score(
        self, *prompts: Prompt, model: Any = None, after: int = 2, side: str = "left", twice: bool = False
    ) -> Any:
        """What the scorer gives for each prompt with images, and the notes of its calls."""
        model = self.model if model is None else model
        watched = _Watched(scorer=self.scorer, twice=twice)
        pipeline = Pipeline(model, stages=[StageSpec(after_layer=after, keep=2, scorer=watched, selector="top-k")])
        scores = pipeline.score(self._inputs(model, *prompts, side=side))[0]
        return scores, watched.notes

    def _inputs(self, model: Any, *prompts: Prompt, side: Any = "left") -> dict[str, torch.Tensor]:
        made = self.factory(prompts, side=side)
        return {
            name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
            for name, value in made.items()
            if isinstance(value, torch.Tensor)
        }

    def _parameters(self) -> str:
        again = type(self.scorer)(**self.scorer.model_dump())
        require(again == self.scorer, f"made again from its own parameters, it is {again!r}")
        from_json = type(self.scorer).model_validate_json(self.scorer.model_dump_json())
        require(from_json == self.scorer, f"made again from JSON, it is {from_json!r}")
        return f"{len(type(self.scorer).model_fields)} parameters"

    def _form(self, after: int) -> str:
        _, notes = self._score(*RAGGED, after=after)
        require(len(notes) == 1, f"called {len(notes)} times")
        ctx, out = notes[0]
        require(out.dtype == torch.float32, f"dtype {out.dtype}, expected float32")
        require(
            out.shape == ctx.visual_index.shape, f"shape {tuple(out.shape)}, expected {tuple(ctx.visual_index.shape)}"
        )
        require(not out.requires_grad, "the saliencies carry a graph; score under torch.no_grad or detach them")
        require(bool(torch.isfinite(out[ctx.visual_valid]).all()), "saliencies of visual tokens are not finite")
        padding = out[~ctx.visual_valid]
        require(bool((padding == float("-inf")).all()), "where a sample has fewer visual tokens, expected -inf")
        require(out.device == ctx.hidden.device, f"on {out.device}, expected {ctx.hidden.device}")
        return f"{tuple(out.shape)}, {int(ctx.visual_valid.sum())} visual tokens, {padding.numel()} -inf"

    def _deterministic(self) -> str:
        first, _ = self._score(*RAGGED, twice=True)
        torch.manual_seed(1)
        second, _ = self._score(*RAGGED, twice=True)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        require(same, "two forwards of the same inputs gave other numbers; draw from ctx.seeds, not from a global seed")
        return "bitwise"

    def _singles(self) -> str:
        together, _ = self._score(*RAGGED)
        alone = [self._score(prompt)[0][0] if prompt.images else torch.empty(0) for prompt in RAGGED]
        return _close(together, alone)

    def _permuted(self) -> str:
        together, _ = self._score(*RAGGED)
        backwards, _ = self._score(*reversed(RAGGED))
        return _close(backwards[::-1], together)

    def _sides(self) -> str:
        left, _ = self._score(*RAGGED)
        right, _ = self._score(*RAGGED, side="right")
        return _close(right, left)

    def _mode(self, mode: Callable[[], Any]) -> str:
        expected, _ = self._score(ONE, TWO)
        with mode():
            actual, notes = self._score(ONE, TWO)
        require(not notes[0][1].requires_grad, "the saliencies carry a graph")
        return _close(actual, expected)

    def _generate(self) -> str:
        pipeline = Pipeline(self.model, stages=[StageSpec(after_layer=2, keep=3, scorer=self.scorer, selector="top-k")])
        with pipeline:
            out = self.model.generate(**self._inputs(self.model, *RAGGED), max_new_tokens=3, do_sample=False)
        kept = pipeline.report.kept_by_stage
        expected = [[3 * len(prompt.images)] if prompt.images else [] for prompt in RAGGED]
        require(kept == expected, f"kept {kept}, expected {expected}")
        return f"{out.shape[0]} answers, kept {kept}"

    def _half(self) -> str:
        _, notes = self._score(ONE, TWO, END, model=tiny_llava(dtype=torch.bfloat16))
        ctx, out = notes[0]
        require(out.dtype == torch.float32, f"dtype {out.dtype}, expected float32")
        require(bool(torch.isfinite(out[ctx.visual_valid]).all()), "saliencies are not finite")
        return "float32 and finite"


def _close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    worst = 0.0
    for sample, (a, b) in enumerate(zip(actual, expected, strict=True)):
        require(a.shape == b.shape, f"sample {sample}: {tuple(a.shape)} and {tuple(b.shape)} saliencies")
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
            require(
                worst <= CLOSE, f"sample {sample}: saliencies differ by {worst:.1e} of the largest, allowed {CLOSE:.0e}"
            )
    return f"largest difference {worst:.1e}"
