"""What reading costs: memory at 2880 patches, floating-point operations, and no projection computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from open_clip.transformer import VisionTransformer
from support.memory import flops, peak_bytes
from support.operators import Operators
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from trio.core.tokens import Signal
from trio.encoders.compressors.visionzip import VisionZip
from trio.encoders.reading.attention import BLOCK_BYTES, received
from trio.encoders.reading.reader import Reader
from trio.encoders.towers import tower_for

LAYERS = 2


def tower(name: str, side: int, width: int = 1024) -> Any:
    """A tower as wide as CLIP-L with few layers, for images of `side` x `side` patches of 2 pixels."""
    config = getattr(transformers, f"{name}VisionConfig")(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        patch_size=2,
        image_size=side * 2,
    )
    return getattr(transformers, f"{name}VisionModel")(config).eval()


# The five tiles of LLaVA-NeXT, and one image whose every patch attends to every other.
SETTINGS = {"CLIP, five tiles of 576": ("CLIP", 24, 5), "SigLIP, one image of 2916": ("Siglip", 54, 1)}


def reading(module: Any, pixels: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """The tower alone, and with a reader of what VisionZip needs."""
    signals = [*VisionZip().reads(), Signal("hidden", -2)]

    def alone() -> None:
        with torch.no_grad():
            module(pixels)

    def read() -> None:
        with torch.no_grad(), Reader(tower_for(module), signals) as reader:
            module(pixels)
            reader.take()

    return alone, read


@pytest.mark.parametrize("setting", SETTINGS)
def test_peak_memory_at_2880_patches_is_at_most_a_tenth_more(setting: str):
    """Of what a call allocates; the weights, which do not change, are not counted."""
    name, side, images = SETTINGS[setting]
    alone, read = reading(tower(name, side), torch.randn(images, 3, side * 2, side * 2))
    without, with_reader = peak_bytes(alone), peak_bytes(read)
    assert with_reader <= 1.1 * without, f"{with_reader / without:.3f} times the memory"


def qwen() -> tuple[Any, Any]:
    config = Qwen2_5_VLVisionConfig(
        depth=LAYERS,
        hidden_size=512,
        intermediate_size=1366,
        num_heads=8,
        out_hidden_size=512,
        fullatt_block_indexes=[0, 1],
        patch_size=4,
        window_size=32,
    )
    pixels = torch.randn(54 * 54, 3 * 2 * 4 * 4)
    images = {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 54, 54]])}
    return modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config), images


def vit(side: int, images: int, **extra: Any) -> tuple[Any, Any]:
    shape = {"patch_size": 2, "embed_dim": 512, "depth": LAYERS, "num_heads": 8}
    module = timm.create_model("vit_base_patch16_224", img_size=side * 2, **shape, **extra)
    return module, torch.randn(images, 3, side * 2, side * 2)


# Fused and hidden projections, rotated and not, one image and five.
OTHERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Qwen2.5-VL": qwen,
    "timm": lambda: vit(24, 5),
    "timm, no class token": lambda: vit(54, 1, class_token=False, global_pool="avg"),
    "open_clip": lambda: (VisionTransformer(48, 2, 512, LAYERS, 8, 4.0), torch.randn(5, 3, 48, 48)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_peak_memory_of_other_towers(name: str, dtype: torch.dtype):
    module, images = OTHERS[name]()
    bound = tower_for(module.to(dtype).eval())
    given = images.to(dtype) if isinstance(images, torch.Tensor) else images

    def alone() -> None:
        with torch.no_grad():
            bound.run(given)

    def read() -> None:
        with torch.no_grad(), Reader(bound, VisionZip().reads()) as reader:
            bound.run(given)
            reader.take()

    without, with_reader = peak_bytes(alone), peak_bytes(read)
    assert with_reader <= 1.1 * without, f"{with_reader / without:.3f} times the memory"


@pytest.mark.parametrize("setting", SETTINGS)
def test_reading_at_2880_patches_costs_at_most_3_percent_of_the_operations(setting: str):
    """Counted on a narrow tower, by formula for one of CLIP-L's width and 24 layers."""
    name, side, images = SETTINGS[setting]
    alone, read = reading(tower(name, side, width=128), torch.randn(images, 3, side * 2, side * 2))
    own = flops(read) - flops(alone)
    rows = side**2 + (name == "CLIP")

    def reader(width: int) -> int:
        """The class token's row is one query against all keys; attention received is every query against them once."""
        products = rows * width if name == "CLIP" else rows**2 * width
        return 2 * images * products

    assert own == reader(128)
    whole = 24 * images * (24 * rows * 1024**2 + 4 * 1024 * rows**2)
    assert reader(1024) <= 0.03 * whole, f"{reader(1024) / whole:.2%} of the tower"


def test_the_blocks_of_queries_are_no_larger_than_the_keys():
    queries, keys = torch.randn(1, 700, 4, 8), torch.randn(1, 700, 4, 8)
    peak = peak_bytes(lambda: received(queries, keys, 0.3))
    assert peak < 8 * keys.numel() * 4, "a whole matrix of 4 x 700 x 700 would be 87 times the keys"
    assert peak < 4 * 700 * 700 * 4 / 10


@pytest.mark.parametrize("block_bytes", [None, 1, 4 * 3 * 4 * 50 * 7, 2**30])
def test_attention_received_does_not_depend_on_the_blocks(block_bytes: int | None):
    queries, keys = torch.randn(3, 50, 4, 8), torch.randn(3, 50, 4, 8)
    expected = torch.einsum("gqhd,gkhd->ghqk", queries.double(), keys.double()).mul(0.3).softmax(-1).mean((1, 2))
    found = received(queries, keys, 0.3, block_bytes=block_bytes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    half = received(queries.bfloat16(), keys.bfloat16(), 0.3, block_bytes=block_bytes)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=1e-4)


@torch.no_grad()
def test_attention_of_qwens_tower_at_16384_patches():
    """Counted on the meta device, which stands for an accelerator: operators, FLOPs and the largest tensor."""
    with torch.device("meta"):
        queries = torch.empty(1, 16384, 16, 80, dtype=torch.bfloat16)
    seen = Operators()
    with FlopCounterMode(display=False) as counter, seen:
        received(queries, queries, 80**-0.5)
    # Linear layers, and the products of windows of 8 x 8 patches and of four layers that see the whole image.
    widths = 4 * 1280**2 + 3 * 1280 * 3420
    pairs = 28 * 64 + 4 * 16384
    tower = 2 * 16384 * (32 * widths + 2 * pairs * 1280)
    assert counter.get_total_flops() == 2 * 16384**2 * 1280
    assert counter.get_total_flops() <= 0.03 * tower, f"{counter.get_total_flops() / tower:.2%} of the tower"
    assert seen.launches <= 100, seen.launches
    assert seen.largest <= BLOCK_BYTES, "no whole matrix"
