"""The interface of selectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..core.part import Part
from ..registry import Registry


class Selector(Part, ABC):
    """Turns saliencies and features into the indices to keep, for a batch of groups of visual tokens.

    A group is an image, or all images of a sample: whatever a stage's `keep` counts for.
    """

    #: True where the selector decides the number itself and takes k as a limit.
    decides_count: ClassVar[bool] = False

    @abstractmethod
    def select(
        self,
        saliency: torch.Tensor,
        features: torch.Tensor,
        k: torch.Tensor,
        valid: torch.Tensor,
        places: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses tokens.

        Args:
            saliency: float32 ``(G, N)``, -inf where not valid.
            features: ``(G, N, D)``.
            k: int64 ``(G,)`` on the CPU, between 0 and the number of valid tokens of the group.
            valid: bool ``(G, N)``.
            places: float32 ``(G, N, 3)``, where each token lies: its row and its column as shares of its picture's
                height and width, from 0 at the top left to 1 (nan where that is not known), and the number of the
                picture among those of the sample. Frames of a video, and a picture and its tiles, are one picture.

        Returns:
            Indices, int64 ``(G, K)`` in rising order with K the largest k, and bool ``(G, K)``, True at the first k of
            each group. The same tokens come out for a group in any batch.
        """


#: Selectors by name.
SELECTORS: Registry[Selector] = Registry("selector", Selector)
