"""Lets torchvision's wheel be imported beside a build of torch without CUDA.

The wheel's compiled operators do not load there, and the import fails at `torchvision::nms`, for which it registers a
shape function. vLLM imports torchvision for one processor and calls no operator of it. `make vllm` puts this file and a
`.pth` file that imports it into its environment: vLLM inspects models in processes of its own.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_libraries: list[Any] = []


class _Definer(importlib.abc.MetaPathFinder):
    """Defines the operators when torchvision is imported first, and finds nothing itself."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name != "torchvision" or _libraries:
            return
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, _Definer())
