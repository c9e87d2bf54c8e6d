"""TRIO's saliency: the gradient of a layer-local proxy of the inference objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field

from ..core.context import LayerContext
from ..core.flops import probe_flops
from ..core.part import Categorical, Choice, IntRange
from ..core.probe import Head
from ..core.shape import ModelShape
from .base import SCORERS, Scorer


@SCORERS.register("objective-gradient")
class ObjectiveGradient(Scorer):
    """L2 norm of the gradient of a layer-local proxy loss by each visual token (TRIO, arXiv 2602.04657).

    One decoder layer, the final norm and the output head are run on the hidden states at the stage; the loss is the
    mean cross-entropy of the logits at a few rows at the end of the prompt against their own argmax. Only those rows
    are computed, which gives the gradient of the whole layer exactly: a visual token reaches them only through its key
    and its value.

    Which rows: the paper's four are mostly words of the chat template ("... assistant :"), which in the first layers
    know nothing of the question yet. The default supervises the text behind the image too: on `tiny-qwen2.5-vl`, on
    whose validation scenes it was chosen, the ranking comes much nearer to that of the end-to-end gradient
    (docs/saliency.md); on `tiny-llava` answers do not measurably differ (docs/results.md). The scorer ``trio`` has the
    released code's rows.

    Parameters:
        positions: supervised rows, at most, counted back from the end (paper and code: 4).
        rows: ``"after-picture"`` supervises rows of the text behind the last image only: the question, and what the
            chat template puts behind it. ``"prompt-end"`` supervises up to the last prompt token, the one that predicts
            the first answer token, as the paper's figure shows; ``"released"`` leaves that one out, as the released
            code does.
        skip: last rows of the prompt to leave out: with the number of tokens that the chat template puts behind the
            question, the question's own words are left. A prompt without any row left scores 0 everywhere.
        probe_layer: ``"next"`` runs the layer that comes after the stage (paper and LLaVA code), ``"last"`` applies
            the layer that has just run once more (released Qwen code); not after layer 0.
        head: what gives the logits: the model's ``"output"`` head, or its ``"input-embedding"``, which the released
            Qwen code uses: the same where the two are tied, another matrix where they are not (7B).
    """

    positions: Annotated[int, Field(ge=1)] = 16
    rows: Literal["after-picture", "prompt-end", "released"] = "after-picture"
    skip: Annotated[int, Field(ge=0)] = 0
    probe_layer: Literal["next", "last"] = "next"
    head: Head = "output"

    def required(self) -> frozenset[str]:
        """Gradients, with ``probe_layer: last`` a layer that has run, and the head."""
        needs = {"last": self.probe_layer == "last", "input-embedding": self.head == "input-embedding"}
        return frozenset({"objective", *(need for need, needed in needs.items() if needed)})

    def score(self, ctx: LayerContext) -> torch.Tensor:
        """See `Scorer.score`; the magnitudes are those of the loss's gradient."""
        skip = self.skip + (self.rows == "released")
        rows = ctx.last_rows(self.positions, skip=skip, behind_images=self.rows == "after-picture")
        return ctx.at_visual(ctx.probe(self.probe_layer).saliency(rows, head=self.head))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """Forward and backward through the supervised rows of one layer."""
        return probe_flops(shape, tokens, min(self.positions, tokens))

    @classmethod
    def search_space(cls) -> Mapping[str, Choice] | None:
        """The default rows and the paper's, and how many."""
        return {"rows": Categorical(("after-picture", "prompt-end")), "positions": IntRange(1, 16)}
