"""Token Merging inside towers against a naive forward written from the paper, and the groups that come out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.library_towers import MODELS, pixels
from support.towers import TOWERS
from torch import nn

from trio.core.tokens import ImageTokens, Signal, VisualTokens
from trio.encoders import compress
from trio.encoders.compressors.tome import ToMe, grouped
from trio.encoders.reading.matching import match
from trio.encoders.reading.reader import Reader
from trio.encoders.towers import tower_for
from trio.errors import InputError, UnsupportedModelError
from trio.testing import TokenInputs, check_adapter, tiny_llava

Attend = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Proportional attention of one input, (heads, n, head_dim): softmax(q k / sqrt(d) + log size) v."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + size.log()
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def heads(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.view(len(rows), count, -1).transpose(0, 1)


def clip_attention(attn: Any, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (heads(getattr(attn, name)(x), attn.num_heads) for name in ("q_proj", "k_proj", "v_proj"))
    return attn.out_proj(attend(q, k, v, size)), k.mean(0)


def internvl_attention(attn: Any, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(x)), attn.v_proj(x)
    q, k, v = (heads(each, attn.num_heads) for each in (q, k, v))
    return attn.projection_layer(attend(q, k, v, size)), k.mean(0)


def dino_attention(attn: Any, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (heads(getattr(attn, name)(x), 4) for name in ("q_proj", "k_proj", "v_proj"))
    return attn.o_proj(attend(q, k, v, size)), k.mean(0)


def timm_attention(attn: Any, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (heads(each, attn.num_heads) for each in attn.qkv(x).chunk(3, dim=-1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    return attn.proj(attend(q, k, v, size)), k.mean(0)


def open_clip_attention(attn: Any, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (heads(each, attn.num_heads) for each in (q, k, v))
    if hasattr(attn, "ln_q"):
        q, k = attn.ln_q(q), attn.ln_k(k)
    return attn.out_proj(attend(q, k, v, size)), k.mean(0)


def identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


# Of a block: norm, attention, what follows it, second norm, feed-forward layer with what follows it.
Parts = tuple[Any, Any, Attend, Any, Any, Any]


def parts_of(block: Any) -> Parts:
    if hasattr(block, "layer_norm1"):  # CLIP, SigLIP
        return block.layer_norm1, block.self_attn, clip_attention, identity, block.layer_norm2, block.mlp
    if hasattr(block, "layernorm_before"):  # InternVL
        return (
            block.layernorm_before,
            block.attention,
            internvl_attention,
            lambda x: x * block.lambda_1,
            block.layernorm_after,
            lambda x: block.mlp(x) * block.lambda_2,
        )
    if hasattr(block, "layer_scale1"):  # DINOv2
        scaled = (block.layer_scale1, block.norm2, lambda x: block.layer_scale2(block.mlp(x)))
        return block.norm1, block.attention, dino_attention, *scaled
    if hasattr(block, "ln_1"):  # open_clip
        scaled = (block.ls_1, block.ln_2, lambda x: block.ls_2(block.mlp(x)))
        return block.ln_1, block.attn, open_clip_attention, *scaled
    return block.norm1, block.attn, timm_attention, block.ls1, block.norm2, lambda x: block.ls2(block.mlp(x))


def naive_merge(
    x: torch.Tensor, metric: torch.Tensor, size: torch.Tensor, members: list[list[int]], r: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """One merge, token by token."""
    n = len(x)
    unit = metric / metric.norm(dim=1, keepdim=True)
    edges = []
    for a in range(0, n, 2):
        options = [(float(unit[a] @ unit[b]), -b) for b in range(1, n, 2) if b >= prefix]
        if a >= prefix and options:
            similarity, b = max(options)
            edges.append((-similarity, a, -b))
    into = {a: b for _, a, b in sorted(edges)[: min(r, (n - prefix) // 2)]}
    groups: dict[int, list[int]] = {i: [i] for i in range(n) if i not in into}
    for a, b in into.items():
        groups[b].append(a)
    order = list(range(prefix)) + [i for i in range(prefix, n) if i % 2 == 0] + list(range(prefix | 1, n, 2))
    order = [i for i in order if i not in into]
    rows = [sum(x[i] * size[i] for i in groups[i0]) / sum(size[i] for i in groups[i0]) for i0 in order]
    sizes = torch.stack([sum((size[i] for i in groups[i0]), torch.zeros(())) for i0 in order])
    return torch.stack(rows), sizes, [[m for i in groups[i0] for m in members[i]] for i0 in order]


def naive_tome(
    blocks: Any, x: torch.Tensor, rs: list[int], prefix: int
) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """The merging blocks of one input: its tokens, the rows that each stands for, their sizes."""
    size, members = torch.ones(len(x)), [[i] for i in range(len(x))]
    for block, r in zip(blocks, rs, strict=False):
        norm, attn, attention, after, second, branch = parts_of(block)
        out, metric = attention(attn, norm(x), size)
        x = x + after(out)
        if r:
            x, size, members = naive_merge(x, metric, size, members, r, prefix)
        x = x + branch(second(x))
    return x, members, size


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    **{
        name: ((lambda name=name: TOWERS[name].make("sdpa")), (lambda: TOWERS["clip"].images(0)["pixel_values"]))
        for name in ("clip", "siglip", "internvl", "dinov2", "dinov2-registers")
    },
    **{name: (make, lambda: pixels(0)) for name, make in MODELS.items() if name != "open_clip timm"},
}
NESTED = not hasattr(TOWERS["dinov2"].make("sdpa").encoder.layer[0].attention, "q_proj")
if NESTED:  # refused there, see the test below
    del CASES["dinov2"], CASES["dinov2-registers"]


def entering(tower: Any, images: torch.Tensor) -> torch.Tensor:
    """What the first block gets."""
    seen: list[torch.Tensor] = []
    handle = tower.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tower.run(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("form", ["r", "keep"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_merging_in_the_tower_is_the_papers(name: str, form: str):
    make, give = CASES[name]
    module, images = make(), give()
    tower = tower_for(module)
    blocks = len(tower.blocks) - 1
    x = entering(tower, images)
    patches = x.shape[1] - tower.prefix
    if form == "r":
        rs = [3] * blocks
        signal, keep = Signal("groups", -2, merges=3), None
    else:
        left = [patches - (patches - patches // 3) * (i + 1) // blocks for i in range(blocks)]
        rs = [a - b for a, b in zip([patches, *left], left, strict=False)]
        signal, keep = Signal("groups", -2), lambda n: n // 3
    wanted = [signal, Signal("hidden", -2), *([Signal("cls", -2)] if tower.has_cls else [])]
    with Reader(tower, wanted, keep=keep) as reader:
        tower.run(images)
        reading = reader.take()
    hidden, groups = (reading.values[each].unflatten(0, (len(images), -1)) for each in wanted[:2][::-1])
    for number in range(len(images)):
        rows, members, size = naive_tome(tower.blocks, x[number], rs, tower.prefix)
        assert (
            len(rows) - tower.prefix == patches - sum(rs) == (patches // 3 if form == "keep" else patches - 3 * blocks)
        )
        assert [len(member) for member in members] == size.tolist()
        for row, member in zip(rows, members, strict=True):
            own = [m - tower.prefix for m in member]
            if own[0] < 0:
                assert len(own) == 1  # class token and registers are left alone
                continue
            assert set(groups[number, own].tolist()) == {min(own)}
            expected = row.expand(len(own), -1)
            torch.testing.assert_close(hidden[number, own], expected, atol=1e-5, rtol=1e-5)
        if tower.has_cls:
            torch.testing.assert_close(reading.values[wanted[2]][number], rows[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_models_above_get_a_row_for_every_patch_and_no_trace_stays(name: str):
    make, give = CASES[name]
    module, images = make(), give()
    tower = tower_for(module)

    def outputs() -> list[torch.Tensor]:
        if name in TOWERS:
            out = module(images, output_hidden_states=True)
            return [out.last_hidden_state, *out.hidden_states]
        out = tower.run(images)
        return list(out) if isinstance(out, tuple) else [out]

    before = outputs()
    with Reader(tower, [Signal("groups", -1)], keep=lambda n: n // 3) as reader:
        merged = outputs()
        groups = reader.take().values[Signal("groups", -1)].unflatten(0, (len(images), -1))
    assert [each.shape for each in merged] == [each.shape for each in before]
    assert not torch.equal(merged[0], before[0])
    assert [len(row.unique()) for row in groups] == [groups.shape[1] // 3] * len(images)
    with Reader(tower, [Signal("groups", -1)], keep=lambda n: n) as reader:
        assert all(torch.equal(a, b) for a, b in zip(outputs(), before, strict=True)), "nothing to merge, other bits"
    assert all(torch.equal(a, b) for a, b in zip(outputs(), before, strict=True))


@torch.no_grad()
def test_compress_leaves_a_token_for_each_group():
    module, images = TOWERS["clip"].make("eager"), TOWERS["clip"].images(0)["pixel_values"]
    results = compress(module, images, "tome-7")
    with Reader(tower_for(module), [Signal("groups", -2), Signal("hidden", -2)], keep=lambda n: 7) as reader:
        module(images)
        values = reader.take().values
    groups, hidden = (value.unflatten(0, (3, 25)) for value in values.values())
    for result, own, rows in zip(results, groups, hidden, strict=True):
        assert result.tokens == 7 and result.sizes.sum() == 25
        assert torch.equal(result.token_index[result.merge_map], own)
        torch.testing.assert_close(result.features, rows[result.token_index])
    fixed = compress(module, images, {"name": "tome", "r": 2}, keep=10)  # 25 - 3 * 2 = 19, the rest after the tower
    assert [result.tokens for result in fixed] == [10] * 3
    assert [result.tokens for result in compress(module, images, {"name": "tome", "r": 6}, keep=20)] == [20] * 3


def test_groups_are_split_where_there_are_too_few():
    groups = torch.tensor([[0, 0, 2, 0, 2, 5, 0], [0, 1, 1, 1, 9, 9, 9]])
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for k, leaders, into in (
        (3, [[0, 2, 5], [0, 1, 2]], [[0, 0, 1, 0, 1, 2, 0], [0, 1, 2, 1, -1, -1, -1]]),
        (5, [[0, 1, 2, 3, 5], [0, 1, 2]], [[0, 1, 2, 3, 2, 4, 0], [0, 1, 2, 1, -1, -1, -1]]),
        (7, [[*range(7)], [0, 1, 2]], [[*range(7)], [0, 1, 2, 1, -1, -1, -1]]),
    ):
        leads, places = grouped(groups, valid, [k, 3])
        assert [row.nonzero().squeeze(1).tolist() for row in leads] == leaders and places.tolist() == into


def test_merging_after_the_tower_goes_on_by_the_features():
    generator = torch.Generator().manual_seed(0)
    signal = ToMe().reads()[0]
    features, groups = torch.randn(12, 8, generator=generator), torch.arange(12)
    tokens = VisualTokens.start(features, ImageTokens.from_grid(3, 4), {signal: groups})
    out = ToMe().compress(tokens, 9)
    assert out.tokens == 9 and out.sizes.sum() == 12
    expected, sizes, members = naive_merge(features, features, torch.ones(12), [[i] for i in range(12)], 3, 0)
    raster = sorted(range(9), key=lambda i: min(members[i]) if len(members[i]) == 1 else members[i][0])
    torch.testing.assert_close(out.features, expected[raster])
    torch.testing.assert_close(out.sizes, sizes[raster])
    assert ToMe().compress(tokens, 2).tokens == 2


@pytest.mark.parametrize(("prefix", "count"), [(0, 12), (1, 13), (2, 12), (4, 11), (5, 6)])
def test_matching_of_a_batch_is_that_of_its_members(prefix: int, count: int):
    metric = torch.randn(3, count, 6, generator=torch.Generator().manual_seed(count))
    values, sizes = torch.randn(3, count, 4), torch.rand(3, count) + 0.5
    for r in (0, 1, 3, 50):
        found = match(metric, r, prefix)
        for one in range(3):
            rows, left, _ = naive_merge(values[one], metric[one], sizes[one], [[i] for i in range(count)], r, prefix)
            torch.testing.assert_close(found.mean(values, sizes)[one], rows)
            torch.testing.assert_close(found.sums(sizes[..., None])[one, :, 0], left)


def test_half_precision_merges_too():
    for name in ("clip", "internvl"):
        module = TOWERS[name].make("sdpa").to(torch.bfloat16)
        images = TOWERS[name].images(0)["pixel_values"].to(torch.bfloat16)
        with torch.inference_mode():
            results = compress(module, images, "tome-9")
        assert all(r.tokens == 9 and r.features.dtype == torch.bfloat16 for r in results)
        assert all(bool(r.features.isfinite().all()) for r in results)


def test_what_cannot_merge_is_refused_by_name():
    for name in ("qwen2.5-vl", "qwen2-vl", "qwen3-vl", "siglip2"):
        tower = tower_for(TOWERS[name].make("sdpa"))
        assert "groups" not in tower.offers()
        with pytest.raises(UnsupportedModelError, match=r"'groups' of block -2.*(packs|pads) images"):
            Reader(tower, [Signal("groups", -2)], keep=lambda n: 4)
    if NESTED:
        with pytest.raises(UnsupportedModelError, match="no mask"):
            Reader(tower_for(TOWERS["dinov2"].make("sdpa")), [Signal("groups", -2)], keep=lambda n: 4)
    module = TOWERS["clip"].make("sdpa")
    tower = tower_for(module)
    with pytest.raises(InputError, match="how many tokens to merge is not known"):
        Reader(tower, [Signal("groups", -2)])
    with pytest.raises(InputError, match="tokens are merged in that block"):
        Reader(tower, [Signal("groups", -2), Signal("keys", -2)], keep=lambda n: 4)
    with pytest.raises(InputError, match="2 ways at once"):
        Reader(tower, [Signal("groups", -2), Signal("groups", -1)], keep=lambda n: 4)
    with pytest.raises(InputError, match="merges is for groups"):
        Reader(tower, [Signal("keys", -2, merges=3)])
    module.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2' takes none.*sdpa"):
        Reader(tower, [Signal("groups", -2)], keep=lambda n: 4).attach()


def test_the_runtime_keeps_its_promises_around_it():
    """All but one: flash-attention takes no bias, which is said when the pipeline is attached."""
    results = check_adapter(tiny_llava(), TokenInputs(), compressor="tome", raise_on_failure=False)
    assert len(results) > 50
    (refused,) = results.failures
    assert refused.name.startswith("flash-attention") and "takes none; load the tower with" in refused.detail
