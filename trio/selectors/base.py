"""The interface of selectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..core.context import SelectionContext
from ..core.part import Part
from ..registry import Registry


class Selector(Part, ABC):
    """Turns saliencies and features into the indices to keep, for a batch of groups of visual tokens.

    A group is an image, or all images of a sample: whatever a stage's `keep` counts for.
    """

    #: True where the selector decides the number itself and takes k as a limit.
    decides_count: ClassVar[bool] = False
    #: True where it chooses on the host in rounds, and waits for an accelerator once in each.
    waits: ClassVar[bool] = False

    @abstractmethod
    def select(self, ctx: SelectionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses tokens.

        Args:
            ctx: the groups, their saliencies, features, counts and origins, see `SelectionContext`.

        Returns:
            Indices, int64 ``(G, K)`` in rising order with K the largest k, and bool ``(G, K)``, True at the first k of
            each group; on the device of the saliencies, or on the CPU where they were chosen there: the runtime then
            need not ask the device what is left. The same tokens come out for a group in any batch.
        """


#: Selectors by name.
SELECTORS: Registry[Selector] = Registry("selector", Selector)
