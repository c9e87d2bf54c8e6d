"""What the package's models have in common: images are encoded by vLLM's own code, and compressed behind the tower."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from ...core.tokens import Signal
from ...encoders.towers.base import Tower
from .encoding import CompressedItem, EncodedItem, compress_items
from .processing import FIELD, SpecProcessor, spec_of_field
from .settings import KEY, EngineSpec, read_spec
from .towers import heard

#: Images whose kept tokens a model remembers, for those who look (`trio.testing.engines`).
REMEMBERED = 1024
T = TypeVar("T")

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object


class ServedModel(_Base):
    """Mixed into a model of vLLM, whose images then have the tokens that their specs leave.

    Attributes:
        reads_specs: the processor that lays out its prompts.
        family: what is known of the model.
        trio_indices: of the images encoded last, which tokens were left.
    """

    reads_specs: ClassVar[type[SpecProcessor]]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model: Any = self
        self.family = self.reads_specs.family_of(model.config, vllm_config.model_config.get_multimodal_config())
        read_spec(getattr(model.config, KEY, None), self.family)
        self.trio_indices: deque[torch.Tensor] = deque(maxlen=REMEMBERED)
        self._trio_tower: Tower | None = None

    def tower(self) -> Tower:
        """The vision tower, to read from."""
        raise NotImplementedError

    def encoded(self, specs: Sequence[EngineSpec], inputs: Any) -> list[EncodedItem]:
        """Encodes images.

        Args:
            specs: of each.
            inputs: what vLLM made of them.
        """
        raise NotImplementedError

    def projector(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What makes features fit the language model; None where the tower has done it."""
        return None

    def laid_out(self, item: EncodedItem, left: CompressedItem) -> torch.Tensor:
        """The rows that an image has in the prompt."""
        return left.features

    def heard(self, specs: Sequence[EngineSpec], run: Callable[[], T]) -> tuple[T, dict[Signal, torch.Tensor]]:
        """See `towers.heard`."""
        if self._trio_tower is None and any(spec.compressor.reads() for spec in specs):
            self._trio_tower = self.tower()
        return heard(self._trio_tower, self.family.tower, specs, run)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of images, each compressed by the spec of its request."""
        model: Any = self
        fields: Any = kwargs.pop(FIELD, None)
        if fields is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]  # vLLM's own
        specs = [spec_of_field(field, self.family) for field in fields]
        items = self.encoded(specs, model._parse_and_validate_image_input(**kwargs))
        left = compress_items(items, self.projector())
        self.trio_indices.extend(one.indices for one in left)
        return tuple(self.laid_out(item, one) for item, one in zip(items, left, strict=True))
