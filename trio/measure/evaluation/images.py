"""The images that the rows show, and how many tokens they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...adapters.base import Adapter
from ...core.images import batch_for
from ...core.upstream import MASK, patch_processor, with_image_processor
from .rows import ImageChoice
from .task import LabelledSample, Task

__all__ = ["Counter", "Shown", "without_floor"]

GREY = (128, 128, 128)
#: Steps of the search for a size: 2 ** -12 of the width is less than a pixel of any image.
STEPS = 12


class Counter:
    """Visual tokens of images, by their size: what is drawn on them plays no part."""

    def __init__(self, adapter: Adapter, processor: Any) -> None:
        """Counts with the model's own processor and layout.

        Args:
            adapter: of the model.
            processor: of the model.
        """
        self._adapter, self._processor = adapter, processor
        self._known: dict[tuple[int, int], int] = {}

    def of_batch(self, inputs: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each prompt, newlines and other structure not counted."""
        images = {name: value for name, value in inputs.items() if name not in ("input_ids", MASK)}
        return self._adapter.visual_tokens(inputs["input_ids"].cpu(), {"image": images})

    def of_size(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of that width and height."""
        if size not in self._known:
            self._known[size] = self.of_batch(batch_for(self._processor, [([Image.new("RGB", size, GREY)], "?")]))[0]
        return self._known[size]

    def smallest(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image that is made as small as it can be."""
        return self.of_size(_scaled(size, 1 / 256))

    def size_for(self, size: tuple[int, int], tokens: float) -> tuple[int, int]:
        """The size, in about the same proportions, at which an image has so many tokens, or next to it."""
        low, high = 1 / 256, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            if self.of_size(_scaled(size, middle)) > tokens:
                high = middle
            else:
                low = middle
        return min((_scaled(size, low), _scaled(size, high)), key=lambda one: abs(self.of_size(one) - tokens))


def without_floor(processor: Any) -> Any:
    """A processor that does not enlarge small images (Qwen's do, up to a number of pixels); else the same one."""
    patches = patch_processor(processor)
    return processor if patches is None else with_image_processor(processor, patches.without_floor().inner)


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    width, height = (max(1, round(side * factor)) for side in size)
    return width, height


class Shown:
    """The images of a task, as each row shows them."""

    def __init__(self, task: Task, counter: Counter, small: Counter) -> None:
        """Remembers which scene stands in for which.

        Args:
            task: the questions.
            counter: of the model.
            small: the same for smaller images, see `without_floor`.
        """
        first = {sample.scene: sample for sample in reversed(task.samples)}
        scenes = sorted(first)
        self._other = {scene: first[after] for scene, after in zip(scenes, scenes[1:] + scenes[:1], strict=True)}
        self._counter, self._small = counter, small

    def image(self, sample: LabelledSample, which: ImageChoice, share: float) -> Image.Image:
        """An image for a question: its own, a grey one of that size, the next scene's, or its own made smaller."""
        if which == "wrong":
            return self._other[sample.scene].load()
        own = sample.load()
        if which == "blank":
            return Image.new("RGB", own.size, GREY)
        if which == "small":
            tokens = share * self._counter.of_size(own.size)
            return own.resize(self._small.size_for(own.size, tokens), Image.Resampling.BICUBIC)
        return own

    def images(self, samples: Sequence[LabelledSample], which: ImageChoice, share: float) -> list[Image.Image]:
        """As `image`, each scene's made once."""
        made: dict[int, Image.Image] = {}
        for sample in samples:
            if sample.scene not in made:
                made[sample.scene] = self.image(sample, which, share)
        return [made[sample.scene] for sample in samples]
