"""A compressor of one's own, in one file outside the package: ``python examples/my_compressor.py``.

``docs/add-a-compressor.md`` explains it line by line.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio
from trio.core.flops import reprojected_flops
from trio.core.part import Categorical, Choice
from trio.core.shape import ModelShape
from trio.core.tokens import Signal, VisualTokens
from trio.encoders.reading.merge import leaders_lead, merge, patches_only, ranking


@trio.COMPRESSORS.register("top-and-rest")
class TopAndRest(trio.Compressor):
    """The tokens with the highest attention, and one more that is the average of all others.

    Parameters:
        layer: block of the tower whose attention is read: from the class token, or received by each patch.
    """

    layer: int = -2

    def reads(self) -> tuple[Signal, ...]:
        """Attention of one block."""
        return (Signal("attention", self.layer),)

    @patches_only
    def compress(self, tokens: VisualTokens, k: int) -> VisualTokens:
        """See `Compressor.compress`."""
        attention = tokens.signals[self.reads()[0]]  # (n,)
        leaders, rank = ranking(attention)[:k].sort()  # in raster order
        rest = rank.argmax()  # the last of the k gathers what is not among them
        return merge(tokens, leaders, leaders_lead(rest.expand(tokens.tokens), leaders))

    def flops(self, shape: ModelShape, *, tokens: int, visual: int, keep: int) -> int:
        """See `Compressor.flops`; the one average passes the projector, and what is read is counted already."""
        return reprojected_flops(shape, 1)

    @classmethod
    def search_space(cls) -> Mapping[str, Choice]:
        """See `Compressor.search_space`."""
        return {"layer": Categorical((-2, -1))}


def main() -> None:
    """Checks the compressor, then uses it by name on the bundled model."""
    from PIL import Image

    from trio.testing import check_compressor

    print(check_compressor(TopAndRest()))

    model, processor = trio.zoo.load("tiny-llava")
    content = [{"type": "image"}, {"type": "text", "text": trio.zoo.demo_question()}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[Image.open(trio.zoo.demo_image())], return_tensors="pt")
    spec = {"version": 1, "name": "mine", "compressor": {"name": "top-and-rest", "layer": -1, "keep": "33.3%"}}
    pipeline = trio.Pipeline.from_spec(spec, model)
    with pipeline:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(trio.zoo.demo_question(), processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(pipeline.report.summary())


if __name__ == "__main__":
    main()
