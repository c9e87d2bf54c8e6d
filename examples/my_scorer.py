"""A scorer of one's own, in one file outside the package: ``python examples/my_scorer.py``.

``docs/add-a-scorer.md`` explains it line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

import trio
from trio.core.part import Choice, FloatRange
from trio.core.probe import rows_at_end
from trio.core.shape import ModelShape


@trio.SCORERS.register("contrast")
class Contrast(trio.Scorer):
    """Tokens that differ from the average visual token and resemble the end of the prompt.

    Both are cosines of the hidden states at the stage, so that their sizes compare.

    Parameters:
        prompt_weight: from 0, only the difference from the average counts, to 1, only the likeness to the prompt.
    """

    prompt_weight: Annotated[float, Field(ge=0, le=1)] = 0.5

    def score(self, ctx: trio.LayerContext) -> torch.Tensor:
        """See `Scorer.score`; values from -1 to 2."""
        hidden = ctx.hidden.detach().float()  # (B, S, D)
        count = ctx.visual.sum(1, keepdim=True).clamp_min(1)
        average = (hidden * ctx.visual[..., None]).sum(1) / count  # (B, D)
        last = rows_at_end(ctx.valid, 1).index[..., None].expand(-1, -1, hidden.shape[-1])
        prompt = hidden.gather(1, last)  # (B, 1, D): each sample's own last token, whatever the padding side
        unlike = 1 - F.cosine_similarity(hidden, average[:, None], dim=-1)
        alike = F.cosine_similarity(hidden, prompt, dim=-1)
        return ctx.at_visual((1 - self.prompt_weight) * unlike + self.prompt_weight * alike)

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """See `Scorer.flops`; cosines with one vector are sums, of which none is counted."""
        return 0

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """See `Scorer.search_space`."""
        return {"prompt_weight": FloatRange(0.0, 1.0)}


def main() -> None:
    """Checks the scorer, then uses it by name on the bundled model."""
    from PIL import Image

    from trio.testing import check_scorer

    print(check_scorer(Contrast(prompt_weight=0.25)))

    model, processor = trio.zoo.load("tiny-llava")
    content = [{"type": "image"}, {"type": "text", "text": trio.zoo.demo_question()}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[Image.open(trio.zoo.demo_image())], return_tensors="pt")
    stage = {"after_layer": "25%", "keep": "33.3%", "scorer": {"name": "contrast", "prompt_weight": 0.25}}
    pipeline = trio.Pipeline.from_spec({"version": 1, "name": "mine", "stages": [stage]}, model)
    with pipeline:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(trio.zoo.demo_question(), processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(pipeline.report.summary())


if __name__ == "__main__":
    main()
