"""Qwen's vision towers in transformers: packed images of any size, rotary positions, fused projections, windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.configs import pair, patch_values, read
from ...core.shape import TowerShape
from ...core.upstream import ROTARY
from ...errors import InputError
from .base import TOWERS, Heads, Held, Layout, Tower, is_a, split_heads

_MODELS = "transformers.models."


@TOWERS.register("qwen-vl")
class QwenTower(Tower):
    """The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one row a patch, the frames of all images in one row of rows.

    An input is one temporal frame of a grid: what the tower's attention sees at once. Patches are in the order
    of the rows of `pixel_values` (blocks of 2 x 2 that become one token); Qwen2.5's order by windows is undone.
    Attention is that of rotated queries and keys. Keys are those before the rotation, which say what a patch shows and
    not where.
    """

    # Some releases of transformers give a tower the type of its model.
    model_types = frozenset(
        {"qwen2_vl", "qwen2_vl_vision", "qwen2_5_vl", "qwen2_5_vl_vision", "qwen3_vl", "qwen3_vl_vision"}
    )
    merging_reason = "it packs images of different sizes into one sequence and rotates by position"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is one of the three towers."""
        return is_a(
            module,
            _MODELS + "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
            _MODELS + "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            _MODELS + "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
            _MODELS + "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel",
        )

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: Qwen2.5-VL's has windows and a gate, Qwen2-VL calls its width `embed_dim`."""
        depth, width = read(config, "depth", "num_hidden_layers"), read(config, "embed_dim", "hidden_size")
        full = getattr(config, "fullatt_block_indexes", None)
        patch, temporal = pair(config.patch_size), pair(config.temporal_patch_size)[0]
        ratio = getattr(config, "mlp_ratio", None)
        return TowerShape(
            layers=depth,
            hidden=width,
            intermediate=int(width * ratio) if ratio else read(config, "intermediate_size"),
            patch_values=patch_values(config) * temporal,
            heads=getattr(config, "num_heads", None),
            gated=full is not None,
            patches_per_token=config.spatial_merge_size**2,
            window=None if full is None else (config.window_size // patch[0]) * (config.window_size // patch[1]),
            full_attention_layers=0 if full is None else sum(0 <= index < depth for index in full),
        )

    def __init__(self, module: nn.Module) -> None:
        """Binds the tower; see `Tower`."""
        super().__init__(module)
        self._merge = int(module.spatial_merge_size)  # type: ignore[arg-type]  # an int attribute
        self.patches_per_token = self._merge**2
        #: Blocks that see whole frames; None where all do.
        self._full: Sequence[int] | None = getattr(module, "fullatt_block_indexes", None)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Tower.blocks`."""
        blocks: Any = self.module.blocks
        return blocks  # type: ignore[no-any-return]  # a ModuleList

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`."""
        found = self.part(block, "attn")
        found.get_submodule("qkv")
        return found

    def seeing_block(self, block: int) -> int | None:
        """See `Tower.seeing_block`."""
        if self._full is None:
            return block
        return min((full for full in self._full if full >= block), default=None)

    def listen_layout(self, told: Callable[[Layout], None]) -> list[RemovableHandle]:
        """See `Tower.listen_layout`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            told(self._layout(grid, kwargs))

        return [self.module.register_forward_pre_hook(before, with_kwargs=True)]

    def _layout(self, given: Any, kwargs: Mapping[str, Any]) -> Layout:
        # Windows are worked out from it on the host, too.
        (grid,) = self.looked.look([torch.as_tensor(given)])
        spans, start = [], 0
        for frames, rows, columns in grid.tolist():
            for _ in range(frames):
                spans.append((start, start + rows * columns))
                start += rows * columns
        return Layout(tuple(spans), 0, self.patch_order(grid, kwargs))

    def patch_order(self, grid: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """See `Layout.order`.

        Args:
            grid: int64 ``(images, 3)`` on the CPU: frames, rows and columns of patches.
            kwargs: of the tower's call.
        """
        if self._full is None:
            return None
        from transformers.vision_utils import get_vision_window_index

        module: Any = self.module
        index, _ = get_vision_window_index(
            grid,
            spatial_merge_size=self._merge,
            window_size=module.window_size,
            patch_size=module.patch_size,
            kwargs=dict(kwargs),
        )
        return self.undone(index)

    def undone(self, index: torch.Tensor) -> torch.Tensor:
        """The order of patches that undoes one of tokens, int64 ``(tokens,)``."""
        back = torch.argsort(index)
        within = torch.arange(self.patches_per_token, device=back.device)
        return (back[:, None] * self.patches_per_token + within).flatten()

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        attention = self.attention(block)
        heads = int(attention.num_heads)  # type: ignore[arg-type]  # an int attribute
        held = Held()

        def hold(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            held.keep("qkv", output)

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            outputs = held.take("qkv")
            if not outputs:
                return
            both = split_heads(outputs[0], 3 * heads)[:, : 2 * heads]
            queries, keys = rotate(both, *kwargs[ROTARY])[None].chunk(2, dim=2)
            told(Heads(queries, keys, both[None, :, heads:], both.shape[-1] ** -0.5))

        return [
            attention.get_submodule("qkv").register_forward_hook(hold),
            attention.register_forward_hook(after, with_kwargs=True),
        ]

    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """See `Tower.run`."""
        images = self._arguments(images)
        return self.module(images["pixel_values"], grid_thw=images["grid_thw"])

    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Tower.grids`."""
        grid = self._arguments(images)["grid_thw"].tolist()
        return [(rows, columns) for frames, rows, columns in grid for _ in range(frames)]

    def _arguments(self, images: torch.Tensor | Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(images, Mapping) or not {"pixel_values", "grid_thw"} <= images.keys():
            raise InputError(
                "images: this tower takes patches of many images in one tensor; give "
                '{"pixel_values": (patches, values), "grid_thw": (images, 3)} as the processor makes them'
            )
        return images


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys ``(S, heads, head_dim)`` turned by ``(S, head_dim)``, in their own dtype as the tower's."""
    dtype = heads.dtype
    heads, cos, sin = heads.float(), cos[:, None].float(), sin[:, None].float()
    (first, second), (sin_first, sin_second) = heads.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    turned = heads * cos
    begin, end = turned.chunk(2, dim=-1)
    begin.addcmul_(second, sin_first, value=-1)
    end.addcmul_(first, sin_second)
    return turned.to(dtype)
