"""The batcher: requests of many callers, in batches of one spec, and each gets what it gets alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from support.serving import Gate, alone, asked, request, until

import trio
from trio import zoo
from trio.batch import DynamicBatcher, PromptAnswer, PromptRequest, QueueFullError
from trio.errors import BusyError, InputError

SOFT, HARD = trio.load_spec("trio-soft-33"), trio.load_spec("trio-soft-11")
DROPPING = trio.load_spec({"version": 1, "name": "own", "compressor": {"name": "divprune", "keep": 30}})
ASKED = asked(24)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture
def gate(loaded: tuple[Any, Any]) -> Iterator[Gate]:
    gate = Gate(loaded[0])
    yield gate
    gate.remove()


@pytest.fixture(scope="module")
def judge() -> tuple[Any, Any]:
    """A model of its own, which no batcher uses."""
    return zoo.load("tiny-llava")


@pytest.fixture
def long_answers(loaded: tuple[Any, Any], judge: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token never comes."""
    for model, _ in (loaded, judge):
        monkeypatch.setattr(model.generation_config, "suppress_tokens", [model.generation_config.eos_token_id])


@pytest.fixture
def batcher(loaded: tuple[Any, Any], gate: Gate) -> Iterator[DynamicBatcher]:
    batcher = DynamicBatcher(*loaded, HARD, max_batch=4, max_wait=0.0, max_queue=12)
    yield batcher
    batcher.close()


def occupy(batcher: DynamicBatcher) -> Future[PromptAnswer]:
    """A request that is in the model, by itself, while the gate is shut."""
    first = batcher.submit(request(ASKED[-1], spec=SOFT))
    until(lambda: batcher.stats.running == 1)
    return first


def results(futures: list[Future[PromptAnswer]]) -> list[PromptAnswer]:
    return [future.result(60) for future in futures]


def test_requests_of_several_specs_at_once_get_what_they_get_alone(
    loaded: tuple[Any, Any], judge: tuple[Any, Any]
) -> None:
    asks, expected = [], []
    for number, one in enumerate(ASKED):
        images = [[one.image], [], [one.image, ASKED[0].image]][0 if number % 6 else number // 6 % 3]
        spec, length = (SOFT, HARD, DROPPING)[number % 3], (1, 2, 8)[number // 3 % 3]
        asks.append(PromptRequest(one.question, images, spec, length))
        expected.append(alone(*judge, spec, images, one.question, max_new_tokens=length))
    with DynamicBatcher(*loaded, HARD, max_wait=0.05) as batcher, ThreadPoolExecutor(8) as pool:
        found = results(list(pool.map(batcher.submit, asks)))
    for answer, ask, (text, tokens, places) in zip(found, asks, expected, strict=True):
        assert (answer.text, answer.new_tokens) == (text, tokens)
        assert [list(one) for one in answer.kept_places] == places
        assert answer.spec == ask.spec.name and answer.visual_tokens == 144 * len(ask.images)
        assert answer.finish == "end" or tokens == ask.max_new_tokens
        assert (answer.kept > 0) == bool(ask.images)
    stats = batcher.stats
    assert stats.outcomes == {"answered": 24} and (stats.waiting, stats.running) == (0, 0)
    assert sum(size * count for size, count in stats.batches.items()) == 24 and max(stats.batches) > 1
    assert stats.new_tokens == sum(answer.new_tokens for answer in found)
    assert stats.kept == pytest.approx(sum(answer.kept for answer in found))


def test_a_spec_that_resizes_images_beside_one_that_does_not() -> None:
    """On a family whose tokens follow an image's size: each spec has a processor of its own."""
    model, processor = zoo.load("tiny-qwen2.5-vl")
    specs = [trio.load_spec({"version": 1, "name": "half", "resize": "50%"}), HARD]
    with DynamicBatcher(model, processor, HARD, max_batch=2) as batcher:
        futures = [batcher.submit(request(one, spec=spec)) for spec in specs for one in ASKED[:2]]
    found = results(futures)
    for number, (spec, one) in enumerate((spec, one) for spec in specs for one in ASKED[:2]):
        own = trio.Pipeline.from_spec(spec, model).processor(processor)
        text, tokens, _ = alone(model, own, spec, [one.image], one.question, max_new_tokens=64)
        assert (found[number].text, found[number].new_tokens) == (text, tokens)
    assert found[0].visual_tokens < found[2].visual_tokens * 0.7


def test_one_spec_is_one_batch_and_the_oldest_request_comes_first(batcher: DynamicBatcher, gate: Gate) -> None:
    order: list[str] = []
    with gate.shut():
        futures = [occupy(batcher)]
        for name, spec in (("rare", DROPPING), *((f"often {n}", HARD) for n in range(6)), ("late", DROPPING)):
            futures.append(batcher.submit(request(ASKED[0], spec=spec)))
            futures[-1].add_done_callback(lambda _, name=name: order.append(name))
        assert batcher.stats.waiting == 8
    sizes = [answer.batch_size for answer in results(futures)]
    assert sizes == [1, 2, 4, 4, 4, 4, 2, 2, 2]
    assert sorted(order[:2]) == ["late", "rare"] and sorted(order[6:]) == ["often 4", "often 5"]


def test_a_spec_written_in_two_ways_is_one(batcher: DynamicBatcher, gate: Gate) -> None:
    with gate.shut():
        futures = [occupy(batcher)]
        for spec in (None, HARD, trio.load_spec("trio-soft-11")):
            futures.append(batcher.submit(request(ASKED[0], spec=spec)))
    assert [answer.batch_size for answer in results(futures)] == [1, 3, 3, 3]


def test_a_free_model_waits_for_others_and_not_once_the_batch_is_full(loaded: tuple[Any, Any]) -> None:
    with DynamicBatcher(*loaded, HARD, max_batch=3, max_wait=300) as batcher:
        futures = [batcher.submit(request(ASKED[0]))]
        futures += [batcher.submit(request(ASKED[1], spec=DROPPING)) for _ in range(3)]
        assert [answer.batch_size for answer in results(futures[1:])] == [3, 3, 3]
        assert not futures[0].done()
        futures += [batcher.submit(request(one)) for one in ASKED[2:4]]
        assert [futures[n].result(60).batch_size for n in (0, 4, 5)] == [3, 3, 3]
    with DynamicBatcher(*loaded, HARD, max_batch=3, max_wait=0.2) as batcher:
        lonely = batcher.submit(request(ASKED[0])).result(60)
    assert lonely.batch_size == 1 and 0.2 <= lonely.waited < lonely.seconds


def test_a_short_answer_does_not_wait_for_the_long_ones_of_its_batch(
    batcher: DynamicBatcher, gate: Gate, long_answers: None
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(piece: str) -> None:
        inside.set()
        assert go_on.wait(60)

    with gate.shut():
        first = occupy(batcher)
        short = batcher.submit(request(ASKED[0], max_new_tokens=1))
        long = batcher.submit(request(ASKED[1], max_new_tokens=30, on_text=hold))
    assert inside.wait(60)
    assert short.result(60).new_tokens == 1
    assert not long.done()
    go_on.set()
    answer = long.result(60)
    assert (answer.new_tokens, answer.finish, answer.batch_size) == (30, "length", 2)
    assert first.result(60).new_tokens == 64


def test_a_cancelled_request_that_waits_is_not_asked_and_leaves_its_place(batcher: DynamicBatcher, gate: Gate) -> None:
    with gate.shut():
        first = occupy(batcher)
        futures = [batcher.submit(request(ASKED[n])) for n in range(12)]
        with pytest.raises(QueueFullError, match="12 requests wait"):
            batcher.submit(request(ASKED[0]))
        assert all(future.cancel() for future in futures[:10])
        assert wait(futures[:10], timeout=30).not_done == set()
        assert batcher.stats.waiting == 2
        futures.append(batcher.submit(request(ASKED[13])))
    assert [answer.batch_size for answer in results([first, *futures[10:]])] == [1, 3, 3, 3]
    assert batcher.stats.outcomes == {"answered": 4, "cancelled": 10, "refused": 1}


def test_a_running_request_that_is_cancelled_ends_without_the_others(
    judge: tuple[Any, Any], batcher: DynamicBatcher, gate: Gate, long_answers: None
) -> None:
    expected = alone(*judge, HARD, [ASKED[1].image], ASKED[1].question, max_new_tokens=20)
    futures: list[Future[PromptAnswer]] = []
    with gate.shut():
        first = occupy(batcher)
        leaving = batcher.submit(request(ASKED[0], max_new_tokens=39, on_text=lambda _: futures[0].cancel()))
        futures.append(leaving)
        staying = batcher.submit(request(ASKED[1], max_new_tokens=20))
        first.cancel()
    answer = staying.result(60)
    assert (answer.text, answer.new_tokens, [list(one) for one in answer.kept_places]) == expected
    assert answer.batch_size == 2 and leaving.cancelled()
    with pytest.raises(CancelledError):
        leaving.result(0)


def test_the_model_stops_once_nobody_waits(batcher: DynamicBatcher, gate: Gate, long_answers: None) -> None:
    futures: list[Future[PromptAnswer]] = []
    with gate.shut():
        futures.append(batcher.submit(request(ASKED[0], on_text=lambda _: futures[0].cancel())))
    until(lambda: batcher.stats.outcomes["cancelled"] == 1 and batcher.stats.running == 0)
    assert batcher.submit(request(ASKED[1], max_new_tokens=1)).result(60).new_tokens == 1
    assert gate.forwards <= 3  # two tokens at most, and the other request's


def test_text_comes_in_pieces_that_are_the_answer(
    judge: tuple[Any, Any], batcher: DynamicBatcher, long_answers: None
) -> None:
    pieces: list[list[str]] = [[] for _ in range(3)]
    futures = [batcher.submit(request(ASKED[n], max_new_tokens=12, on_text=pieces[n].append)) for n in range(3)]
    for answer, told, one in zip(results(futures), pieces, ASKED, strict=False):
        assert "".join(told) == answer.text == alone(*judge, HARD, [one.image], one.question, max_new_tokens=12)[0]
        assert len(told) > 3 and all(told)


def test_an_error_of_a_listener_is_its_own(batcher: DynamicBatcher, gate: Gate) -> None:
    def fail(piece: str) -> None:
        raise RuntimeError("the loop is closed")

    with gate.shut():
        occupy(batcher)
        failing, other = batcher.submit(request(ASKED[0], on_text=fail)), batcher.submit(request(ASKED[1]))
    assert other.result(60).batch_size == 2
    assert failing.cancelled() and batcher.healthy


def test_a_request_that_cannot_be_answered_fails_alone(
    judge: tuple[Any, Any], batcher: DynamicBatcher, gate: Gate
) -> None:
    bad: Any = PromptRequest("what is it ?", ["no image"])  # type: ignore[list-item]  # what it is about
    with gate.shut():
        occupy(batcher)
        futures = [batcher.submit(one) for one in (request(ASKED[0]), bad, request(ASKED[1]))]
    with pytest.raises(InputError, match=r"request: the model or its processor does not take it .*check its images"):
        futures[1].result(60)
    for number, one in ((0, ASKED[0]), (2, ASKED[1])):
        answer = futures[number].result(60)
        assert answer.text == alone(*judge, HARD, [one.image], one.question, max_new_tokens=64)[0]
        assert answer.batch_size == 1
    assert batcher.healthy


def test_a_batch_that_fails_in_the_middle_is_asked_one_by_one_and_no_text_comes_twice(
    loaded: tuple[Any, Any], judge: tuple[Any, Any], batcher: DynamicBatcher, gate: Gate, long_answers: None
) -> None:
    steps: list[int] = []

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        steps.extend(kwargs["input_ids"].shape[1:])
        if len(kwargs["input_ids"]) == 2 and len(steps) == 5:
            raise torch.OutOfMemoryError("no memory")

    pieces: list[str] = []
    with gate.shut():
        occupy(batcher).cancel()
        told = batcher.submit(request(ASKED[0], max_new_tokens=10, on_text=pieces.append))
        other = batcher.submit(request(ASKED[1], max_new_tokens=10))
        handle = loaded[0].register_forward_pre_hook(fail, with_kwargs=True)
    answers = results([told, other])
    handle.remove()
    assert len(steps) == 5 + 10 + 10 and [answer.batch_size for answer in answers] == [1, 1]
    assert "".join(pieces) == answers[0].text
    assert answers[0].text == alone(*judge, HARD, [ASKED[0].image], ASKED[0].question, max_new_tokens=10)[0]


def test_no_memory_for_one_request_alone_is_said(
    loaded: tuple[Any, Any], batcher: DynamicBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "generate", fail)
        with pytest.raises(BusyError, match="has not the memory for it, not even alone; send fewer"):
            batcher.submit(request(ASKED[0])).result(60)
    assert batcher.healthy


def test_an_error_of_the_device_is_told_to_all_and_to_whoever_asks_for_health(
    loaded: tuple[Any, Any], batcher: DynamicBatcher, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("device-side assert")

    with gate.shut():
        first = occupy(batcher)
        until(lambda: gate.forwards == 1)  # it is past `generate`, which fails from now on
        futures = [batcher.submit(request(ASKED[n])) for n in range(2)]
        monkeypatch.setattr(loaded[0], "generate", fail)
    for future in futures:
        with pytest.raises(RuntimeError, match="device-side"):
            future.result(60)
    until(lambda: not batcher.healthy)
    assert batcher.broken == "RuntimeError: device-side assert"
    monkeypatch.undo()
    assert first.result(60).text and batcher.submit(request(ASKED[0])).result(60).text
    until(lambda: batcher.healthy)
    assert batcher.stats.outcomes == {"answered": 2, "failed": 2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"question": " \n"}, r"request\.question: it is empty"),
        ({"question": "<image> what ?"}, r"request\.question: found '<image>', which the model reads as a token"),
        ({"question": "what </s>"}, "found '</s>'"),
        ({"max_new_tokens": 0}, r"request\.max_new_tokens: found 0; give a number from 1"),
        (
            {"spec": {"stages": [{"after_layer": 0, "keep": 9, "scorer": "last-token-attention"}]}},
            r"stages\[0\]\.scorer: .* use after_layer: 1 or more",
        ),
        ({"spec": {"stages": [{"after_layer": 99, "keep": 9}]}}, "99"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_once(
    batcher: DynamicBatcher, wrong: dict[str, Any], message: str
) -> None:
    given = {"question": "what is it ?", "images": [ASKED[0].image], **wrong}
    if "spec" in wrong:
        given["spec"] = trio.load_spec({"version": 1, **wrong["spec"]})
    with pytest.raises(trio.TrioError, match=message):
        batcher.submit(PromptRequest(**given))
    assert batcher.stats.outcomes == {"refused": 1}


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait": -0.1}, {"max_wait": float("nan")}])
def test_wrong_settings_are_refused(loaded: tuple[Any, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^{next(iter(wrong))}: found .*; give a number from"):
        DynamicBatcher(*loaded, HARD, **wrong)


def test_closing_answers_what_waits_and_takes_no_more(loaded: tuple[Any, Any], gate: Gate) -> None:
    batcher = DynamicBatcher(*loaded, HARD, max_batch=2, max_wait=300)
    with gate.shut():
        futures = [batcher.submit(request(ASKED[n])) for n in range(5)]
        closing = threading.Thread(target=batcher.close, args=(60,))
        closing.start()
        until(lambda: not batcher.healthy)
        with pytest.raises(BusyError, match="shutting down"):
            batcher.submit(request(ASKED[0]))
    closing.join(60)
    assert [answer.batch_size for answer in results(futures)] == [2, 2, 2, 2, 1]


def test_closing_at_once_tells_everybody(loaded: tuple[Any, Any], gate: Gate, long_answers: None) -> None:
    batcher = DynamicBatcher(*loaded, HARD, max_batch=2, max_wait=0)
    with gate.shut():
        futures = [occupy(batcher), *(batcher.submit(request(ASKED[n])) for n in range(3))]
        closing = threading.Thread(target=batcher.close)
        closing.start()
        for future in futures:
            with pytest.raises(BusyError, match="shutting down; send it again"):
                future.result(60)
    closing.join(60)
    assert not closing.is_alive() and gate.forwards < 3
    assert batcher.stats.outcomes == {"failed": 4}


def test_the_model_is_as_before_and_others_use_it_meanwhile(
    loaded: tuple[Any, Any], judge: tuple[Any, Any], batcher: DynamicBatcher
) -> None:
    from trio.testing.promises.reversibility import footprint

    model, processor = loaded
    one = ASKED[0]
    expected = alone(*judge, SOFT, [one.image], one.question, max_new_tokens=8)[0]
    inputs = processor(text=f"<image> {one.question}", images=[one.image], return_tensors="pt")
    stock = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    before = footprint(model)
    futures = [batcher.submit(request(other)) for other in ASKED[:10]]
    for _ in range(5):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), stock)
        trio.Pipeline.from_spec(SOFT, model).generate(**inputs, max_new_tokens=8, do_sample=False)
    futures.append(batcher.submit(request(one, spec=SOFT, max_new_tokens=8)))
    assert results(futures)[-1].text == expected
    batcher.close()
    assert footprint(model) == before


def test_metrics_are_in_the_format_of_prometheus(batcher: DynamicBatcher, gate: Gate) -> None:
    with gate.shut():
        futures = [occupy(batcher), *(batcher.submit(request(ASKED[n])) for n in range(6))]
        futures[-1].cancel()
        text = batcher.stats.prometheus()
        assert "trio_waiting_requests 5\n" in text and "trio_running_requests 1\n" in text
    answers = results(futures[:-1])
    until(lambda: batcher.stats.running == 0)
    text = batcher.stats.prometheus()
    line = re.compile(r'# TYPE trio_\w+ (counter|gauge|histogram)|trio_\w+(\{\w+="[^"]+"\})? [\d.e+]+')
    assert all(line.fullmatch(one) for one in text.splitlines())
    values = dict(one.rsplit(" ", 1) for one in text.splitlines() if one[0] != "#")
    assert values['trio_requests_total{outcome="answered"}'] == "6"
    assert values['trio_requests_total{outcome="cancelled"}'] == "1"
    assert values['trio_batch_size_bucket{le="1"}'] == "2" and values['trio_batch_size_bucket{le="4"}'] == "3"
    assert values['trio_batch_size_bucket{le="+Inf"}'] == values["trio_batch_size_count"] == "3"
    assert values["trio_batch_size_sum"] == "6" and values["trio_visual_tokens_total"] == str(6 * 144)
    assert float(values["trio_kept_tokens_total"]) == pytest.approx(sum(answer.kept for answer in answers))


def test_how_long_to_stay_away_follows_what_was_measured(batcher: DynamicBatcher) -> None:
    stats = batcher.stats
    assert stats.retry_after(4) == 1.0
    stats.batches.update({4: 3, 2: 1})
    stats.model_seconds, stats.waiting = 8.0, 8
    assert stats.retry_after(4) == 6.0
