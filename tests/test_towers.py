"""Signals of every tower against the eager attention's own matrices, and readers that leave no trace."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.towers import TOWERS, TowerCase

from trio.core.tokens import Signal
from trio.encoders.reading.reader import Reader, Reading
from trio.encoders.towers import tower_for
from trio.encoders.towers.base import hidden_of
from trio.errors import AttachError, InputError, UnsupportedModelError

pytestmark = pytest.mark.contract
NAMES = sorted(TOWERS)
PACKED = [name for name in NAMES if name.startswith("qwen")]


def close(found: torch.Tensor, value: torch.Tensor, signal: Signal) -> None:
    torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5, msg=lambda text: f"{signal}: {text}")


def signals(case: TowerCase) -> list[Signal]:
    kinds = ["attention", "keys", "hidden", *(["cls"] if case.cls else [])]
    wanted = [Signal(kind, layer) for kind in kinds for layer in (0, 2, -2, -1)]
    return [*wanted, Signal("attention", -2, heads="one")]


def read(case: TowerCase, module: Any, *, seed: int = 0) -> Reading:
    with Reader(tower_for(module), signals(case)) as reader, torch.no_grad():
        module(**case.images(seed))
        return reader.take()


@dataclass
class Stock:
    """What a stock eager call computed, block by block: attention, queries, keys of each input; hidden states."""

    attention: list[list[torch.Tensor]] = field(default_factory=list)  # [block][input]: (heads, n, n)
    queries: list[list[torch.Tensor]] = field(default_factory=list)  # (heads, n, head_dim)
    keys: list[list[torch.Tensor]] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)


def stock(case: TowerCase, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Stock:
    """Every matrix that the eager attention makes, for each block and input (packed towers: for each segment)."""
    module, found = case.make("eager"), Stock()
    modelling = sys.modules[type(module).__module__]
    eager = modelling.eager_attention_forward

    def recording(layer: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = eager(layer, query, key, *args, **kwargs)
        found.attention[-1] += list(weights)
        found.queries[-1] += list(query)
        found.keys[-1] += list(key)
        return out, weights

    def begin(*_: Any) -> None:
        for each in (found.attention, found.queries, found.keys):
            each.append([])

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modelling, "eager_attention_forward", recording)
        for block in tower_for(module).blocks:
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(lambda m, args, out: found.hidden.append(hidden_of(out)))
        module(**case.images(seed))
    if not case.packed:  # the matrices that the model itself gives out
        given = case.make("eager")(**case.images(seed), output_attentions=True).attentions
        for ours, theirs in zip(found.attention, given, strict=True):
            assert torch.equal(torch.stack(ours), theirs)
    return found


def expected(case: TowerCase, found: Stock, signal: Signal) -> torch.Tensor:
    """A signal from whole matrices, by its definition."""
    depth = len(found.hidden)
    block = signal.layer % depth
    if signal.kind in ("attention", "keys"):
        block = (case.seeing or {}).get(block, block)
    if signal.kind == "cls":
        return found.hidden[block][:, 0]
    rows = []
    counts = case.counts()
    if signal.kind == "hidden":
        hidden = found.hidden[block]
        rows = [hidden[i, case.prefix : case.prefix + n] for i, n in enumerate(counts)]
    for i, n in enumerate(counts if not rows else ()):
        real = case.prefix + n
        if signal.kind == "keys":
            rows.append(found.keys[block][i].transpose(0, 1)[case.prefix : real])
            continue
        weights = found.attention[block][i][:, :real, :real]
        if signal.heads == "one":
            q, k = (each[block][i].transpose(0, 1).flatten(1)[:real] for each in (found.queries, found.keys))
            weights = (q @ k.T / q.shape[1] ** 0.5).softmax(-1)[None]
        received = weights.mean(0)[0] if case.cls else weights.mean(0).mean(0)
        rows.append(received[case.prefix :])
    return torch.cat(rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PACKED])
def test_signals_are_those_of_the_eager_attention(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    case = TOWERS[name]
    found = stock(case, monkeypatch)
    reading = read(case, case.make(implementation))
    assert reading.inputs == case.counts()
    for signal in signals(case):
        value = reading.values[signal]
        close(value, expected(case, found, signal), signal)
        assert value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_signals_of_packed_towers_are_those_of_the_eager_attention(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """In the order of the rows of `pixel_values`, rotated for attention, plain for keys."""
    case = TOWERS[name]
    found, module = stock(case, monkeypatch), case.make(implementation)
    reading = read(case, module)
    assert reading.inputs == case.counts()
    order = row_order(case)
    for signal in signals(case):
        block = signal.layer % 4
        if signal.kind != "hidden":
            block = (case.seeing or {}).get(block, block)
        if signal.kind == "hidden":
            computed = found.hidden[block]
        elif signal.kind == "keys":
            entering = found.hidden[block - 1] if block else None
            if entering is None:
                continue  # block 0 is compared where it sees windows, through the attention of another block
            attn = module.blocks[block].attn
            with torch.no_grad():
                computed = attn.qkv(module.blocks[block].norm1(entering)).view(len(entering), 3, 4, -1)[:, 1]
        else:
            weights = found.attention[block]
            if signal.heads == "one":
                pairs = zip(found.queries[block], found.keys[block], strict=True)
                flat = [[each.transpose(0, 1).flatten(1) for each in pair] for pair in pairs]
                weights = [(q @ k.T / q.shape[1] ** 0.5).softmax(-1)[None] for q, k in flat]
            assert len(weights) == len(case.counts())
            computed = torch.cat([matrix.mean(0).mean(0) for matrix in weights])
        close(reading.values[signal], computed[order], signal)


def row_order(case: TowerCase) -> torch.Tensor:
    """Where each row of `pixel_values` stands among the rows that the blocks see.

    The patch embedding is asked to give each row's number, and the first block is listened to.
    """
    module = case.make("sdpa")
    images = case.images(0)
    numbers = torch.arange(len(images["hidden_states"]), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    module.patch_embed.register_forward_hook(lambda m, args, out: numbers[:, None].expand_as(out).clone())
    module.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][:, 0]))
    with torch.no_grad():
        module(**images)
    return seen[0].argsort()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_leave_no_trace(name: str):
    case = TOWERS[name]
    module = case.make("sdpa")

    def state() -> list[Any]:
        return [
            (path, sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
            for path, part in module.named_modules()
        ]

    with torch.no_grad():
        before = module(**case.images(0))[0]
        clean = state()
        reader = Reader(tower_for(module), signals(case))
        with reader:
            assert torch.equal(module(**case.images(0))[0], before), "reading changed what the tower gives"
            assert state() != clean
        assert state() == clean
        with pytest.raises(RuntimeError, match="stop"), reader:
            raise RuntimeError("stop")
        assert state() == clean
        assert torch.equal(module(**case.images(0))[0], before)


@pytest.mark.parametrize("name", NAMES)
def test_calls_one_after_the_other_are_read_in_order(name: str):
    case = TOWERS[name]
    module = case.make("sdpa")
    one, two = read(case, module, seed=1), read(case, module, seed=2)
    with Reader(tower_for(module), signals(case)) as reader, torch.inference_mode():
        module(**case.images(1))
        module(**case.images(2))
        both = reader.take()
        with pytest.raises(InputError, match="not called since"):
            reader.take()
        with pytest.raises(AttachError, match="attached already"):
            reader.attach()
    assert both.inputs == one.inputs + two.inputs
    for signal in signals(case):
        assert torch.equal(both.values[signal], torch.cat([one.values[signal], two.values[signal]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_float32_signals(name: str, dtype: torch.dtype):
    case = TOWERS[name]
    module = case.make("sdpa")
    exact = read(case, module).values
    images = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.images(0).items()}
    with Reader(tower_for(module.to(dtype)), signals(case)) as reader, torch.no_grad():
        module(**images)
        rough = reader.take().values
    for signal in signals(case):
        assert rough[signal].dtype == (torch.float32 if signal.kind in ("attention", "keys") else dtype)
        if signal.kind == "attention":
            n = len(exact[signal]) / len(case.counts())
            assert (rough[signal] - exact[signal]).abs().mean() * n < 0.25, signal


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_read_is_refused_by_name(name: str):
    case = TOWERS[name]
    tower = tower_for(case.make("sdpa"))
    with pytest.raises(UnsupportedModelError, match=r"'keys' of block 4.*has 4 blocks"):
        Reader(tower, [Signal("keys", 4)])
    with pytest.raises(UnsupportedModelError, match="-5"):
        Reader(tower, [Signal("hidden", -5)])
    with pytest.raises(InputError, match="heads='one'"):
        Reader(tower, [Signal("keys", -1, heads="one")])
    if not case.cls:
        with pytest.raises(UnsupportedModelError, match="no class token"):
            Reader(tower, [Signal("cls", -1)])


def test_a_window_tower_without_a_later_full_block_is_refused():
    module = TOWERS["qwen2.5-vl"].make("sdpa")
    module.fullatt_block_indexes = [1]
    with pytest.raises(UnsupportedModelError, match="no block from there on sees a whole image"):
        Reader(tower_for(module), [Signal("attention", 2)])


def test_a_call_that_stops_early_is_an_error_and_the_next_one_works():
    case = TOWERS["clip"]
    module = case.make("sdpa")
    with Reader(tower_for(module), [Signal("keys", -1)]) as reader, torch.no_grad():
        handle = module.encoder.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module(**case.images(0))
        handle.remove()
        with pytest.raises(InputError, match="ended before block 3"):
            reader.take()
        module(**case.images(0))
        assert reader.take().inputs == case.counts()


def test_modules_that_are_no_towers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"nothing registered takes a Linear.*clip"):
        tower_for(torch.nn.Linear(2, 2))
    module = TOWERS["clip"].make("sdpa")
    del module.encoder.layers[0].self_attn.q_proj
    with pytest.raises(UnsupportedModelError, match="not built as those known"):
        tower_for(module)


@pytest.mark.parametrize("name", ["clip", "qwen2.5-vl"])
def test_projections_under_lora_are_read_as_they_run(name: str):
    """An adapter on the projections changes keys and attention; the reader sees what the tower computes with it."""
    import peft

    case = TOWERS[name]
    module = case.make("sdpa")
    plain = read(case, module)
    targets = ["qkv"] if case.packed else ["q_proj", "k_proj"]
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted = read(case, wrapped)
    merged = read(case, wrapped.merge_and_unload())
    for signal in signals(case):
        torch.testing.assert_close(adapted.values[signal], merged.values[signal], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted.values[Signal("keys", -1)], plain.values[Signal("keys", -1)], atol=1e-3)


def test_offloaded_towers_are_read():
    import accelerate

    case = TOWERS["clip"]
    plain = read(case, case.make("sdpa"))
    offloaded = accelerate.cpu_offload(case.make("sdpa"), execution_device=torch.device("cpu"))
    assert next(offloaded.encoder.layers[0].self_attn.q_proj.parameters()).device.type == "meta"
    found = read(case, offloaded)
    assert all(torch.equal(found.values[signal], plain.values[signal]) for signal in signals(case))
