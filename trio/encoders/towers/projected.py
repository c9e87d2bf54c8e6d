"""What towers of transformers with separate query and key projections have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.configs import grid_of, patch_values, read
from ...core.shape import TowerShape
from ...core.upstream import HIDDEN, MASK
from ...errors import UnsupportedModelError
from .base import Heads, Held, Tower, pair, pixel_grid, split_heads


class ProjectedTower(Tower):
    """A tower whose blocks hold an attention module with submodules that give queries and keys ``(B, S, width)``."""

    blocks_path: ClassVar[str] = "encoder.layers"
    #: Below a block.
    attention_path: str = "self_attn"
    #: Below the attention: the modules whose outputs meet in the attention.
    query_path: str = "q_proj"
    key_path: str = "k_proj"
    #: Below a block: the norm in front of the feed-forward layer, and that layer.
    merge_paths: ClassVar[tuple[str, str]] = ("layer_norm2", "mlp")

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: images of one size, `prefix` rows beside the patches, a plain feed-forward layer."""
        rows, columns = grid_of(config)
        return TowerShape(
            layers=read(config, "num_hidden_layers"),
            hidden=read(config, "hidden_size"),
            intermediate=read(config, "intermediate_size"),
            patch_values=patch_values(config),
            heads=getattr(config, "num_attention_heads", None),
            cls_tokens=cls.prefix,
            crop_patches=rows * columns,
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Tower.blocks`."""
        found: Any = self.module.get_submodule(self.blocks_path)
        blocks: Sequence[nn.Module] = found
        return blocks

    @property
    def heads(self) -> int:
        """Attention heads of each block."""
        heads: int = self.config.num_attention_heads
        return heads

    @property
    def config(self) -> Any:
        """The configuration of the module."""
        return self.module.config

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`."""
        found = self.part(block, self.attention_path)
        found.get_submodule(self.query_path), found.get_submodule(self.key_path)
        return found

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        attention = self.attention(block)
        held = Held()

        def hold(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
            def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                held.keep(name, output)

            return after

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if outputs := held.take("queries", "keys"):
                queries, keys = (split_heads(rows, self.heads) for rows in outputs)
                told(Heads(queries, keys, keys, queries.shape[-1] ** -0.5))

        return [
            attention.get_submodule(self.query_path).register_forward_hook(hold("queries")),
            attention.get_submodule(self.key_path).register_forward_hook(hold("keys")),
            attention.register_forward_hook(after),
        ]

    def merge_points(self, block: int) -> tuple[nn.Module, nn.Module]:
        """See `Tower.merge_points`."""
        if self.merging_reason:
            return super().merge_points(block)
        norm, branch = self.merge_paths
        return self.part(block, norm), self.part(block, branch)

    def bias_attention(self, block: int, bias: Callable[[], torch.Tensor | None]) -> list[RemovableHandle]:
        """See `Tower.bias_attention`."""
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation not in ("eager", "sdpa"):
            raise UnsupportedModelError(
                f"groups: merged tokens need a bias in the attention of the {type(self.module).__name__}, and "
                f'{implementation!r} takes none; load the tower with attn_implementation="sdpa" or "eager"'
            )

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            added = bias()
            if added is None:
                return None
            hidden = args[0] if args else kwargs[HIDDEN]
            return args, {**kwargs, MASK: added[:, None, None].to(hidden.dtype)}

        return [self.attention(block).register_forward_pre_hook(before, with_kwargs=True)]

    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """See `Tower.run`."""
        return self.module(**images) if isinstance(images, Mapping) else self.module(pixel_values=images)

    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Tower.grids`."""
        pixels = images["pixel_values"] if isinstance(images, Mapping) else images
        return pixel_grid(pixels, pair(self.config.patch_size))
