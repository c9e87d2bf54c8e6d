"""Teacher forcing: logits at every position of a given answer, with the tokens that `generate` keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.families import FAMILIES, family

import trio
from trio import zoo
from trio.core.images import batch_for
from trio.core.prompts import Prompt
from trio.core.upstream import MASK, Role, keywords
from trio.errors import InputError, UnsupportedModelError
from trio.measure.shapesvqa.task import canvas_for, drawn_scenes
from trio.measure.teacher import (
    PositionAgreement,
    ReferenceAnswer,
    compare_positions,
    forced_logits,
    greedy_answer,
    kl,
    teacher_forced,
)
from trio.testing.bench import extended

SPECS: dict[str, dict[str, Any]] = {
    "stages": {
        "stages": [{"after_layer": "25%", "keep": "30%"}, {"after_layer": "50%", "keep": "10%"}],
        "positions": "original",
    },
    "both": {
        "compressor": {"name": "visionzip", "keep": "40%"},
        "stages": [{"after_layer": "50%", "keep": "15%", "scorer": "last-token-attention", "selector": "top-k"}],
    },
    "compact": {"stages": [{"after_layer": 0, "keep": "20%"}], "positions": "auto"},
}
LONGEST = 12
#: Families whose own `generate` drops logits processors.
OWN_GENERATE = {"janus"}


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl"])
def asked(request: pytest.FixtureRequest) -> tuple[Any, list[Any], Any]:
    """A model, three prompts of different lengths with images of their own, and their left-padded batch."""
    model, processor = zoo.load(request.param)
    scenes = drawn_scenes("validation", canvas_for(model), 11)
    texts = ("describe", "how many circles are there?", "on which side of the red shape is the blue one?")
    prompts = [([next(scenes).image], text) for text in texts]
    alone = [batch_for(processor, [prompt]) for prompt in prompts]
    batch = batch_for(processor, prompts)
    lengths = {one["input_ids"].shape[1] for one in alone}
    assert len(lengths) > 1 and max(lengths) == batch["input_ids"].shape[1]  # padded, and on the left
    assert not bool(batch[MASK][:, 0].all())
    return model, alone, batch


@pytest.fixture(scope="module")
def full(asked: tuple[Any, list[Any], Any]) -> ReferenceAnswer:
    model, _, batch = asked
    return greedy_answer(model, batch, max_new_tokens=LONGEST)


def stock(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            **batch, max_new_tokens=LONGEST, do_sample=False, output_logits=True, return_dict_in_generate=True
        )


def test_the_full_model_s_own_answer_and_logits(asked: tuple[Any, list[Any], Any], full: ReferenceAnswer) -> None:
    model, _, batch = asked
    out = stock(model, batch)
    assert torch.equal(full.tokens, out.sequences[:, batch["input_ids"].shape[1] :])
    assert torch.equal(full.logits, torch.stack(out.logits, 1))
    end = model.generation_config.eos_token_id
    assert full.lengths[0] == LONGEST  # a description goes on: it is cut off
    assert max(full.lengths[1:]) < LONGEST
    for row, length in enumerate(full.lengths[1:], 1):
        assert full.tokens[row, :length].eq(end).nonzero().flatten().tolist() == [length - 1]


def test_forced_to_its_own_answer_the_full_model_says_what_it_said(
    asked: tuple[Any, list[Any], Any], full: ReferenceAnswer
) -> None:
    model, _, batch = asked
    forced = forced_logits(model, batch, full.tokens)
    for row, length in enumerate(full.lengths):
        assert torch.equal(forced[row, :length], full.logits[row, :length])
    for one, length in zip(teacher_forced(model, batch, full), full.lengths, strict=True):
        assert one == PositionAgreement((True,) * length, (0.0,) * length)


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_one_pass_that_replays_the_kept_tokens(
    asked: tuple[Any, list[Any], Any], full: ReferenceAnswer, name: str
) -> None:
    """Another way to the same numbers: no cache, no `generate`, no batch, the indices of a free answer replayed."""
    model, alone, batch = asked
    pipeline = trio.Pipeline.from_spec({"version": 1, **SPECS[name]}, model)
    with pipeline:
        stock(model, batch)
        kept = pipeline.report.selection()
    forced = forced_logits(model, batch, full.tokens, pipeline)
    assert pipeline.report.selection() == kept
    assert not pipeline.attached
    expected, moved = [], 0.0
    for row, (inputs, length) in enumerate(zip(alone, full.lengths, strict=True)):
        answered = extended(inputs, torch.cat([inputs["input_ids"], full.tokens[row : row + 1, : length - 1]], 1))
        with pipeline.replay([[by_sample[row]] for by_sample in kept]), torch.no_grad():
            once = model(**answered, **keywords({Role.USE_CACHE: False})).logits[0, -length:].float()
        assert torch.allclose(forced[row, :length], once, rtol=1e-4, atol=2e-4 * float(once.abs().max()))
        moved = max(moved, float((once - full.logits[row, :length]).abs().max()))
        expected.append((once, kl(full.logits[row, :length], once)))
    assert moved > 0.1  # the pipeline changes what is said
    for one, (once, divergence), row in zip(
        teacher_forced(model, batch, full, pipeline), expected, range(3), strict=True
    ):
        assert one.kl == pytest.approx(divergence.tolist(), rel=1e-2, abs=1e-4)
        own = full.logits[row, : len(once)]
        clear = (once.topk(2).values.diff().abs().flatten() > 1e-2) & (own.topk(2).values.diff().abs().flatten() > 1e-2)
        same = once.argmax(-1) == own.argmax(-1)
        assert [a for a, sure in zip(one.top1, clear.tolist(), strict=True) if sure] == same[clear].tolist()


def test_forced_to_its_own_answer_a_pipeline_says_what_it_said(asked: tuple[Any, list[Any], Any]) -> None:
    model, _, batch = asked
    pipeline = trio.Pipeline.from_spec({"version": 1, **SPECS["stages"]}, model)
    with pipeline:
        out = stock(model, batch)
    free = torch.stack(out.logits, 1)
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    own = greedy_answer(model, batch, pipeline, max_new_tokens=LONGEST)
    assert torch.equal(own.tokens, tokens) and torch.equal(own.logits, free)
    forced = forced_logits(model, batch, tokens, pipeline)
    for row, length in enumerate(own.lengths):
        assert torch.equal(forced[row, :length], free[row, :length])


def test_an_answer_that_the_model_would_not_give(asked: tuple[Any, list[Any], Any], full: ReferenceAnswer) -> None:
    """What is fed decides, not what the model would choose: another answer, stepwise, by one pass each."""
    model, alone, _ = asked
    inputs = alone[0]
    other = full.tokens[:1].flip(1)
    forced = forced_logits(model, inputs, other)
    for step in (0, 1, 5):
        with torch.no_grad():
            ids = torch.cat([inputs["input_ids"], other[:, :step]], 1)
            once = model(**(extended(inputs, ids) if step else inputs)).logits[0, -1].float()
        assert torch.allclose(forced[0, step], once, rtol=1e-4, atol=2e-4 * float(once.abs().max()))


def test_kl_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    full, other = torch.randn(5, 40, generator=generator) * 6, torch.randn(5, 40, generator=generator) * 6
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=full.double()), torch.distributions.Categorical(logits=other.double())
    )
    assert torch.allclose(kl(full, other), expected, rtol=1e-9)
    assert kl(full, full).tolist() == [0.0] * 5
    assert torch.allclose(
        kl(full, full + 3.0), torch.zeros(5, dtype=torch.float64), atol=1e-6
    )  # only differences count


def test_kl_by_hand_and_with_tokens_ruled_out() -> None:
    never = float("-inf")
    full = torch.tensor([[math.log(0.75), math.log(0.25), never], [0.0, 0.0, never]])
    other = torch.tensor([[0.0, 0.0, never], [0.0, never, 0.0]])
    found = kl(full, other).tolist()
    assert found[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert found[1] == math.inf  # the other model rules out what the full one says half of the time


@pytest.mark.filterwarnings("ignore:no adapter knows")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - OWN_GENERATE))
def test_every_family_is_forced_with_the_tokens_of_a_free_answer(name: str) -> None:
    model, make = family(name)
    inputs = make([Prompt("what is", 1, "this thing"), Prompt("describe", 2, "in many more words , please")])
    pipeline = trio.Pipeline(model, stages=[{"after_layer": "25%", "keep": "40%"}], positions="auto")
    own = greedy_answer(model, inputs, pipeline, max_new_tokens=4)
    kept = pipeline.report.selection()
    assert torch.equal(forced_logits(model, inputs, own.tokens, pipeline), own.logits)
    other = own.tokens.flip(0)  # each is made to give the other's answer
    crossed = forced_logits(model, inputs, other, pipeline)
    assert torch.equal(crossed[:, 0], own.logits[:, 0])
    assert not torch.equal(crossed[:, -1], own.logits[:, -1]) or torch.equal(other, own.tokens)
    assert pipeline.report.selection() == kept


@pytest.mark.filterwarnings("ignore:no adapter knows")
@pytest.mark.parametrize("name", sorted(OWN_GENERATE))
def test_a_model_that_cannot_be_told_what_to_say_is_refused(name: str) -> None:
    model, make = family(name)
    inputs = make([Prompt("what is", 1, "this thing")])
    own = greedy_answer(model, inputs, max_new_tokens=3)
    with pytest.raises(UnsupportedModelError, match="gave other tokens than it was told to"):
        forced_logits(model, inputs, (own.tokens + 1) % 90)


def test_positions_behind_an_end_do_not_count() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[:, :, 0] = 2.0
    other = logits.clone()
    other[0, 1] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    other[1, 2] = torch.tensor([0.0, 2.0, 0.0, 0.0])  # behind the end of the second answer
    found = compare_positions(ReferenceAnswer(torch.zeros(2, 3, dtype=torch.long), (3, 2), logits), other)
    assert [one.top1 for one in found] == [(True, False, True), (True, True)]
    e = math.exp(2)
    assert found[0].kl == pytest.approx((0.0, 2 * (e - 1) / (e + 3), 0.0))
    assert found[1].kl == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(1, 3), (3, 0)])
def test_tokens_of_another_shape(asked: tuple[Any, list[Any], Any], shape: tuple[int, int]) -> None:
    model, _, batch = asked
    with pytest.raises(InputError, match="for 3 prompts"):
        forced_logits(model, batch, torch.zeros(shape, dtype=torch.long))


def test_a_model_that_stops_by_itself_is_refused(
    asked: tuple[Any, list[Any], Any], full: ReferenceAnswer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, batch = asked
    monkeypatch.setattr(model.generation_config, "max_time", 1e-9)
    with pytest.raises(InputError, match="it stopped after 1 of 12 tokens"):
        forced_logits(model, batch, full.tokens)
