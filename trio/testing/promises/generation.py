"""Promise 6, first part: every way of generating that works on the stock model works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ...core.prompts import Inputs, Prompt
from ...core.upstream import MASK, Role, cache_of, dynamic_cache, keywords
from ...pipeline import Pipeline
from ..bench import (
    END,
    NEW,
    ONE,
    RAGGED,
    TEXT,
    TWO,
    Bench,
    Selection,
    Setting,
    extended,
    image_inputs,
    joined,
    reduced,
)
from ..results import Case, require

NEXT = Prompt("And what about the other one ?")
NEXT_IMAGE = Prompt("Now this one", 7, "what is it ?")


def cases(bench: Bench) -> Iterator[Case]:
    """Sampling, beams, streaming, no cache, second turns, inference mode, a cache of the user's."""
    yield "sampling", partial(_sampling, bench, 1)
    yield "sampling, two sequences a prompt", partial(_sampling, bench, 2)
    yield "beams", partial(_beams, bench, 1)
    yield "beams, two sequences a prompt", partial(_beams, bench, 2)
    yield "streaming", partial(_streaming, bench)
    yield "use_cache=False", partial(_uncached, bench, {})
    yield "use_cache=False, beams", partial(_uncached, bench, {"num_beams": 2})
    yield "torch.inference_mode", partial(_inference_mode, bench)
    yield "a cache of the user's", partial(_own_cache, bench)
    yield "steps by hand, without generate", partial(_by_hand, bench)
    for setting in bench.settings:
        yield f"second turn, {setting.label}", partial(_second_turn, bench, setting, NEXT)
        yield f"second turn with a new image, {setting.label}", partial(_second_turn, bench, setting, NEXT_IMAGE)


def _run(bench: Bench, prompts: tuple[Prompt, ...], **more: Any) -> tuple[Pipeline, Any, Selection]:
    pipeline = bench.pipeline()
    with pipeline:
        out = bench.generate(bench.inputs(*prompts), **more)
        selection = reduced(pipeline.report).selection()
    return pipeline, out, selection


COPIES = "not promised: the stock model itself mixes up images when it copies prompts"


def _copied(bench: Bench) -> tuple[Prompt, ...] | None:
    """Prompts that the stock model generates several sequences for, None where it cannot.

    transformers 5.17 mixes up the images (and the tiles of one image) of a prompt when it copies each prompt.
    """
    for prompts in (RAGGED, (ONE, TEXT, END)):
        torch.manual_seed(7)
        try:
            out = bench.generate(bench.inputs(*prompts), do_sample=True, num_return_sequences=2)
            bench.follows_replay(None, prompts, out, [])
        except (AssertionError, RuntimeError, ValueError):
            continue
        return prompts
    return None


def _sampling(bench: Bench, sequences: int) -> str:
    prompts = RAGGED if sequences == 1 else _copied(bench)
    if prompts is None:
        return COPIES

    def run() -> tuple[Pipeline, Any, Selection]:
        torch.manual_seed(7)
        return _run(bench, prompts, do_sample=True, num_return_sequences=sequences)

    pipeline, out, selection = run()
    require(torch.equal(out.sequences, run()[1].sequences), "the same seed gave other tokens")
    error = bench.follows_replay(pipeline, prompts, out, _unexpanded(selection, prompts))
    return f"{out.sequences.shape[0]} sequences of {len(prompts)} prompts, largest error {error:.1e}"


def _beams(bench: Bench, sequences: int) -> str:
    prompts = _copied(bench)
    if prompts is None:
        return COPIES
    pipeline, out, selection = _run(bench, prompts, num_beams=3, num_return_sequences=sequences, output_scores=True)
    error = _beam_error(bench, pipeline, prompts, out, selection)
    return f"{out.sequences.shape[0]} sequences of {len(prompts)} prompts, scores within {error:.1e}"


def _beam_error(bench: Bench, pipeline: Pipeline, prompts: tuple[Prompt, ...], out: Any, selection: Selection) -> float:
    """How far the scores of the sequences are from those of one pass each that replays the indices."""
    selection = _unexpanded(selection, prompts)
    worst = 0.0
    for row in range(out.sequences.shape[0]):
        logits = bench.replayed(pipeline, prompts, out.sequences, row, selection)
        chosen = out.sequences[row, -NEW:]
        steps = logits[0, -NEW:].float().log_softmax(-1)
        score = steps.gather(1, chosen[:, None]).sum() / NEW
        worst = max(worst, abs(float(score - out.sequences_scores[row])) / max(1.0, abs(float(score))))
    require(worst <= bench.tolerance, f"scores of the beams differ by {worst:.1e}, allowed {bench.tolerance:.0e}")
    return worst


def _unexpanded(selection: Selection, prompts: tuple[Prompt, ...]) -> Selection:
    """The selection of each prompt once, from what `generate` recorded for several copies of each."""
    return [by_sample[:: len(by_sample) // len(prompts)] for by_sample in selection]


def _streaming(bench: Bench) -> str:
    class Streamer:
        """What transformers wants of a streamer: put and end."""

        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    pipeline, out, selection = _run(bench, (ONE,), streamer=streamer)
    require(streamer.ended and streamer.tokens == out.sequences[0].tolist(), "the streamer got other tokens")
    return f"{NEW} tokens, largest error {bench.follows_replay(pipeline, (ONE,), out, selection):.1e}"


def _uncached(bench: Bench, more: dict[str, Any]) -> str:
    copied = _copied(bench) if more else RAGGED
    if copied is None:
        return COPIES
    prompts = (ONE, TWO) if TWO in copied else (ONE, END)
    try:
        inputs = bench.inputs(*prompts)
        stock = [bench.generate(inputs, **_caching(cached), **more).sequences for cached in (True, False)]
    except Exception as failed:  # whatever the stock model does without a cache
        return f"not promised: the stock model itself fails without a cache ({type(failed).__name__})"
    if bench.exact and not torch.equal(*stock):
        return "not promised: the stock model itself gives other tokens without a cache"
    pipeline, cached, selection = _run(bench, prompts, **more)
    other, out, _ = _run(bench, prompts, **_caching(False), **more)
    first = other.reports[0].selection()
    if bench.exact:
        require(torch.equal(out.sequences, cached.sequences), "other tokens than with a cache")
        bench.same_tokens(first, selection, "first step without a cache")
    require(all(report.selection() == first for report in other.reports), "the selection changed between the steps")
    if more:
        return "the same tokens, one selection"
    error = bench.follows_replay(pipeline, prompts, out, first)
    return f"the same tokens, one selection in {len(other.reports)} reports, largest error {error:.1e}"


def _inference_mode(bench: Bench) -> str:
    _, expected, selection = _run(bench, RAGGED)
    with torch.inference_mode():
        _, out, found = _run(bench, RAGGED)
    require(found == selection, "other tokens were kept")
    require(torch.equal(torch.stack(out.logits), torch.stack(expected.logits)), "logits differ")
    return f"{NEW} steps as under torch.no_grad, bitwise"


def _own_cache(bench: Bench) -> str:
    _, expected, _ = _run(bench, RAGGED)
    for config in (None, bench.adapter.text_config):
        _, out, _ = _run(bench, RAGGED, **keywords({Role.CACHE: dynamic_cache(config)}))
        require(torch.equal(torch.stack(out.logits), torch.stack(expected.logits)), "logits differ")
    return "2 caches, bitwise as with generate's own"


def _caching(wanted: bool) -> dict[str, Any]:
    return keywords({Role.USE_CACHE: wanted})


def _by_hand(bench: Bench) -> str:
    """The prompt, then the tokens that `generate` chose one by one, on the cache that the first forward made."""
    inputs = bench.inputs(ONE, TWO)
    try:
        _steps(bench, inputs)
    except RuntimeError:
        return "not promised: the stock model itself cannot be stepped with ids, mask and cache alone"
    with bench.pipeline():
        steps, expected = _steps(bench, inputs)
    return f"{NEW} steps, largest error {bench.close(steps, expected, 'by hand'):.1e}"


def _steps(bench: Bench, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B, NEW, vocabulary)`` of steps by hand, and those of `generate`."""
    with torch.no_grad():
        expected = bench.generate(inputs)
        out = bench.model(**inputs, **_caching(True))
        mask, cache = inputs[MASK], cache_of(out)
        steps = [out.logits[:, -1]]
        for step in range(NEW - 1):
            token = expected.sequences[:, step - NEW, None]
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            given = keywords({Role.IDS: token, Role.MASK: mask, Role.CACHE: cache, Role.USE_CACHE: True})
            out = bench.model(**given)
            steps.append(out.logits[:, -1])
    return torch.stack(steps, 1), torch.stack(expected.logits, 1)


def _second_turn(bench: Bench, setting: Setting, prompt: Prompt) -> str:
    if not _stock_second_turn(bench, prompt):
        return "not promised: the stock model itself cannot do this, or differs from one pass"
    pipeline = bench.pipeline(setting)
    with pipeline:
        out, conversation, selections = _conversation(bench, prompt, lambda: reduced(pipeline.report).selection())
        merged = [
            [[*first[0], *(second[0] if prompt.images else [])]] for first, second in zip(*selections, strict=True)
        ]
    with pipeline.replay(merged):
        expected = bench.forward(conversation)[:, -NEW:]
    error = bench.close(torch.stack(out.logits, 1), expected, "second turn")
    return f"{NEW} steps, largest error against one pass {error:.1e}"


def _conversation(
    bench: Bench, prompt: Prompt, record: Callable[[], Selection]
) -> tuple[Any, Inputs, tuple[Selection, Selection]]:
    """Two turns on one cache: the second answer, the whole conversation without its last token, both selections."""
    first = bench.inputs(ONE)
    answer = bench.generate(first)
    before = record()
    turn = bench.inputs(prompt)
    whole = joined(extended(first, answer.sequences), turn)
    passed = {name: value for name, value in whole.items() if name not in image_inputs(whole)}
    passed.update({name: turn[name] for name in image_inputs(turn)})
    out = bench.generate(passed, **keywords({Role.CACHE: cache_of(answer)}))
    return out, extended(whole, out.sequences[:, :-1]), (before, record())


def _stock_second_turn(bench: Bench, prompt: Prompt) -> bool:
    """Whether the stock model's second turn on a cache equals one pass."""
    try:
        out, conversation, _ = _conversation(bench, prompt, list)
        bench.close(torch.stack(out.logits, 1), bench.forward(conversation)[:, -NEW:], "stock")
    except Exception:  # whatever the stock model does with a turn that it cannot take
        return False
    return True
