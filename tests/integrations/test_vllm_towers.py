"""Reading vLLM's vision towers, without vLLM: on modules that hand queries and keys on as vLLM's do.

One process that has all heads, and two that have half of them each, read the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import nn

from trio.core.tokens import Signal
from trio.encoders.reading.reader import Reader
from trio.integrations.vllm.settings import ServedFamily, ServedTower, read_spec
from trio.integrations.vllm.towers import ServedClipTower, ServedQwenTower, heard, of_tokens

HEADS, WIDTH = 4, 8


class Attention(nn.Module):
    """Gets queries, keys and values of its heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, WIDTH**-0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        return value


class Rotary(nn.Module):
    """Turns the halves of each head into each other."""

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.roll(1, -1)


class ClipBlock(nn.Module):
    """Hands queries and keys of its own heads on, ``(B, S, heads, WIDTH)``."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        super().__init__()
        self.queries, self.keys = queries.flatten(2), keys.flatten(2)
        self.self_attn = nn.ModuleDict({"attn": Attention(queries.shape[2])})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.self_attn["attn"](self.queries, self.keys, self.keys)
        return hidden


class Clip(nn.Module):
    """A tower of such blocks, of which each process builds its own."""

    def __init__(self, heads: slice, values: list[torch.Tensor]) -> None:
        super().__init__()
        blocks = nn.ModuleList(ClipBlock(q[:, :, heads], k[:, :, heads]) for q, k in values)
        encoder = nn.ModuleDict({"layers": blocks})
        self.vision_model = nn.ModuleDict({"encoder": encoder})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for block in self.vision_model["encoder"]["layers"]:
            pixels = block(pixels)
        return pixels


class QwenBlock(nn.Module):
    """The same with a rotation in between, ``(1, S, heads, WIDTH)``, and names for the arguments."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys
        self.attn = nn.ModuleDict({"apply_rotary_emb": Rotary(), "attn": Attention(queries.shape[2])})

    def forward(self) -> None:
        turned = self.attn["apply_rotary_emb"](torch.cat([self.queries, self.keys]))
        queries, keys = turned.chunk(2)
        self.attn["attn"](query=queries, key=keys, value=keys, max_seqlen=None)


class Qwen(nn.Module):
    """A tower with windows of one token by one, of which the last block sees whole images."""

    spatial_merge_size = 2

    def __init__(self, heads: slice, values: list[torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(QwenBlock(q[:, :, heads], k[:, :, heads]) for q, k in values)
        self.fullatt_block_indexes = [len(values) - 1]

    def get_window_index_thw(self, frames: int, rows: int, columns: int) -> tuple[torch.Tensor, None]:
        return torch.arange(frames * rows * columns // 4).flip(0), None

    def forward(self, pixels: torch.Tensor, grid_thw: list[list[int]]) -> torch.Tensor:
        for block in self.blocks:
            block()
        return pixels


class Meeting:
    """Two processes that exchange tensors, as threads."""

    def __init__(self) -> None:
        self.barrier, self.brought = Barrier(2), [torch.empty(0)] * 2

    def exchange(self, rank: int, values: torch.Tensor) -> list[torch.Tensor]:
        self.brought[rank] = values
        self.barrier.wait(10)
        both = list(self.brought)
        self.barrier.wait(10)
        return both


class Half:
    """One of them: see `Peers`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def gather(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self.meeting.exchange(self.rank, values), dim)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.exchange(self.rank, values)).mean(0)


def clip(heads: slice, values: Any, peers: Any = None) -> tuple[Any, Callable[[], Any]]:
    module = Clip(heads, values)
    return ServedClipTower(module, peers), lambda: module(torch.zeros(2, 10, 3))


def qwen(heads: slice, values: Any, peers: Any = None) -> tuple[Any, Callable[[], Any]]:
    module = Qwen(heads, values)
    return ServedQwenTower(module, peers), lambda: module(torch.zeros(24, 3), grid_thw=[[1, 4, 4], [1, 2, 4]])


SHAPES = {clip: (2, 10, HEADS, WIDTH), qwen: (1, 24, HEADS, WIDTH)}


def values_of(make: Any) -> list[Any]:
    torch.manual_seed(0)
    return [(torch.randn(SHAPES[make]) * 2, torch.randn(SHAPES[make])) for _ in range(2)]


def read(tower: Any, run: Callable[[], Any], signals: list[Signal]) -> dict[Signal, torch.Tensor]:
    with Reader(tower, signals) as reader:
        run()
        return dict(reader.take().values)


SIGNALS = [Signal("attention", 1), Signal("attention", 1, "one"), Signal("keys", 1)]


@pytest.mark.parametrize("make", [clip, qwen])
def test_two_halves_of_the_heads_read_what_one_whole_reads(make):
    values, meeting = values_of(make), Meeting()
    whole = read(*make(slice(None), values), SIGNALS)

    def half(rank: int) -> dict[Signal, torch.Tensor]:
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        return read(*make(heads, values, Half(meeting, rank)), SIGNALS)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(half, range(2)):
            assert found.keys() == whole.keys()
            for signal, expected in whole.items():
                torch.testing.assert_close(found[signal], expected)
    alone = read(*make(slice(0, HEADS // 2), values), SIGNALS)
    assert not torch.allclose(alone[SIGNALS[0]], whole[SIGNALS[0]])  # half of the heads say something else


def test_what_is_read_is_the_class_tokens_row_by_hand():
    values = values_of(clip)
    found = read(*clip(slice(None), values), SIGNALS)
    queries, keys = values[1]
    rows = []
    for number in range(2):
        row = torch.zeros(9)
        for head in range(HEADS):
            scores = [float(queries[number, 0, head] @ keys[number, at, head]) * WIDTH**-0.5 for at in range(10)]
            row += torch.tensor(scores).softmax(0)[1:] / HEADS
        rows.append(row)
    torch.testing.assert_close(found[SIGNALS[0]], torch.cat(rows))
    torch.testing.assert_close(found[SIGNALS[2]], keys[:, 1:].flatten(0, 1))


def test_patches_come_in_the_order_of_the_output_and_tokens_have_their_mean():
    values = values_of(qwen)
    tower, run = qwen(slice(None), values)
    spec = read_spec(
        {"compressor": {"name": "visionzip", "keep": 2, "layer": -1}, "positions": "original"},
        ServedFamily("Qwen-VL", "original", "", tower=ServedTower(2, 2, (1,))),
    )
    assert spec is not None
    _, found = heard(tower, ServedTower(2, 2, (1,)), [spec], run)
    assert not tower.blocks[1].attn["attn"]._forward_pre_hooks  # gone after the call
    attention, keys = spec.compressor.reads()
    queries, plain = values[1][0][0], values[1][1][0]
    turned_queries, turned = queries.roll(1, -1), plain.roll(1, -1)
    expected = []
    for first, last in ((0, 16), (16, 24)):
        scores = torch.einsum("qhd,khd->hqk", turned_queries[first:last], turned[first:last]) * WIDTH**-0.5
        received = scores.softmax(-1).mean((0, 1))
        expected.append(received.unflatten(0, (-1, 4)).flip(0).flatten())  # the windows of each image were turned round
    torch.testing.assert_close(found[attention], torch.cat(expected))
    undone = [part.unflatten(0, (-1, 4)).flip(0).flatten(0, 1) for part in plain.split((16, 8))]
    torch.testing.assert_close(found[keys], torch.cat(undone))
    patches = torch.arange(16, 24).view(2, 4)
    own = of_tokens(found, patches, spec)
    torch.testing.assert_close(own[attention], torch.stack([expected[1][:4].mean(), expected[1][4:].mean()]))
    assert own[keys].shape == (2, HEADS, WIDTH)


def test_a_call_that_reads_nothing_has_no_hooks():
    spec = read_spec("divprune-2", ServedFamily("LLaVA", "compact", ""))
    assert spec is not None
    assert heard(None, ServedTower(2, 2), [spec], lambda: "features") == ("features", {})
