"""open_clip's own vision transformer, with every pooling: what pools comes after the blocks and is not touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...core.shape import TowerShape
from .base import TOWERS, Heads, Held, Tower, is_a, pair, pixel_grid, pixels_of, split_heads
from .weights import shape_of_weights


@TOWERS.register("open-clip")
class OpenClipTower(Tower):
    """`open_clip.transformer.VisionTransformer`, the `visual` of CLIP, CustomTextCLIP and CoCa models.

    Its usual blocks hold torch's `nn.MultiheadAttention`, which gives neither queries nor keys to anybody, so the query
    of the class token and the keys of the blocks that are read are projected once more, from the weights. Models whose
    `visual` is a timm model are read through the timm tower.
    """

    has_cls = True
    prefix = 1
    features_block = -2

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is open_clip's `VisionTransformer`."""
        return is_a(module, "open_clip.transformer.VisionTransformer")

    @classmethod
    def cost_shape(cls, config: Any) -> TowerShape:
        """See `Tower.cost_shape`: of a module, by its weights; pooling and its projection are left out."""
        tower = cls(config)
        rows, columns = pair(config.grid_size)
        heads = int(tower.attention(0).num_heads)  # type: ignore[arg-type]  # an int attribute
        return shape_of_weights(tower, config.conv1, "mlp", heads=heads, patches=rows * columns)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Tower.blocks`."""
        blocks: Any = self.module.get_submodule("transformer.resblocks")
        return blocks  # type: ignore[no-any-return]  # a ModuleList

    def attention(self, block: int) -> nn.Module:
        """See `Tower.attention`."""
        found = self.part(block, "attn")
        if getattr(self.module.get_submodule("transformer"), "batch_first", True) is not True:
            raise self.refuse("its transformer is built with batch_first=False")
        if isinstance(found, nn.MultiheadAttention):
            if found.in_proj_weight is None or found.bias_k is not None or found.add_zero_attn:
                raise self.refuse("its nn.MultiheadAttention has separate widths of keys, or extra keys")
        elif getattr(found, "logit_scale", None) is not None:
            raise self.refuse("its attention is a scaled cosine")
        else:
            found.get_submodule("ln_q"), found.get_submodule("ln_k")
        return found

    def listen(self, block: int, told: Callable[[Heads], None]) -> list[RemovableHandle]:
        """See `Tower.listen`."""
        attention = self.attention(block)
        if isinstance(attention, nn.MultiheadAttention):
            return [attention.register_forward_hook(_ask(attention, told, self))]
        return listen_to_norms(attention, "ln_q", "ln_k", told)

    def merge_points(self, block: int) -> tuple[nn.Module, nn.Module]:
        """See `Tower.merge_points`."""
        return self.part(block, "ln_2"), self.part(block, "mlp")

    def bias_attention(self, block: int, bias: Callable[[], torch.Tensor | None]) -> list[RemovableHandle]:
        """See `Tower.bias_attention`."""
        attention = self.attention(block)
        if isinstance(attention, nn.MultiheadAttention):
            return [bias_argument(attention, "key_padding_mask", lambda added: added, bias)]
        return [bias_argument(attention, "attn_mask", lambda added: added[:, None, None], bias)]

    def run(self, images: torch.Tensor | Mapping[str, Any]) -> Any:
        """See `Tower.run`."""
        return self.module(pixels_of(images))

    def grids(self, images: torch.Tensor | Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Tower.grids`."""
        return pixel_grid(pixels_of(images), pair(self.module.patch_size))


def _ask(attention: nn.MultiheadAttention, told: Callable[[Heads], None], tower: Tower) -> Callable[..., None]:
    """A hook that projects the class token's query and all keys from what the attention was given."""
    if attention.in_proj_weight.device.type == "meta":
        raise tower.refuse("its weights are offloaded, and torch's nn.MultiheadAttention does not give its keys")

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        with torch.no_grad():
            width = attention.embed_dim
            weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias
            parts = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
            queries = F.linear(args[0][:, :1], weight[:width], parts[0])
            keys = split_heads(F.linear(args[1], weight[width : 2 * width], parts[1]), attention.num_heads)
            scale: float = attention.head_dim**-0.5
        told(Heads(split_heads(queries, attention.num_heads), keys, keys, scale))

    return after


def bias_argument(
    attention: nn.Module,
    name: str,
    shaped: Callable[[torch.Tensor], torch.Tensor],
    bias: Callable[[], torch.Tensor | None],
) -> RemovableHandle:
    """A hook that gives a bias by key to an attention that takes it under the given name."""

    def before(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        added = bias()
        return None if added is None else (args, {**kwargs, name: shaped(added).to(args[0].dtype)})

    return attention.register_forward_pre_hook(before, with_kwargs=True)


def listen_to_norms(attention: nn.Module, query: str, key: str, told: Callable[[Heads], None]) -> list[RemovableHandle]:
    """Hooks on modules that give queries and keys ``(B, heads, S, head_dim)``, and on the attention that holds them."""
    held = Held()

    def hold(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            held.keep(name, output.transpose(1, 2))

        return after

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if outputs := held.take(query, key):
            queries, keys = outputs
            told(Heads(queries, keys, keys, queries.shape[-1] ** -0.5))

    return [
        *(attention.get_submodule(name).register_forward_hook(hold(name)) for name in (query, key)),
        attention.register_forward_hook(after),
    ]
