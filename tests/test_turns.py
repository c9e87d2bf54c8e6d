"""Threads that share a model: turns, calls of their own, and the stock model beside them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interrupts import interrupted, lines_of
from support.models import inputs, llava

import trio
from trio.errors import AttachError, BusyError, InputError
from trio.runtime.turns import Turn, Turns, frame_of, is_running, turns_of
from trio.testing.promises.reversibility import footprint

PROMPTS = [[5, "image", 6, 7], [8, "image", 9, 10, 11], [12, 4, "image", 6], [9, "image", "image", 7, 3]]
PARTS: dict[str, dict[str, Any]] = {
    "stage": {"stages": [trio.Stage(after_layer=1, keep="50%")]},
    "dropping": {"compressor": {"name": "visionzip", "keep": "60%"}},
    "merging": {"compressor": {"name": "tome", "keep": "40%"}},
    "both": {"stages": [trio.Stage(after_layer=2, keep="25%")], "compressor": {"name": "divprune", "keep": "80%"}},
}
BATCHES = [inputs([prompt]) for prompt in PROMPTS]


@pytest.fixture
def model():
    model = llava()
    generate(model.generate, BATCHES[0])  # transformers leaves capture hooks of its own at a first call
    return model


def generate(call: Callable[..., Any], batch: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    """The logits of three greedy steps."""
    out = call(
        **batch,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )
    return torch.cat(out.logits)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Runs a call in a thread; the list gets its result or its error."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """Holds one thread in the middle of the model."""

    def __init__(self, model: Any) -> None:
        self.inside, self.open = threading.Event(), threading.Event()
        self._first = True
        self._handle = model.model.language_model.layers[2].register_forward_pre_hook(self._hold)

    def _hold(self, module: Any, args: Any) -> None:
        if self._first:
            self._first = False
            self.inside.set()
            assert self.open.wait(60)

    def remove(self) -> None:
        self._handle.remove()


def test_requests_of_a_thread_pool_with_specs_of_their_own_beside_the_stock_model(model):
    before = footprint(model)
    pipelines: dict[str, Any] = {name: trio.Pipeline(model, **parts) for name, parts in PARTS.items()}
    calls = {"stock": model.generate, **{name: pipeline.generate for name, pipeline in pipelines.items()}}
    single = {(name, i): generate(calls[name], batch) for name in calls for i, batch in enumerate(BATCHES)}
    for name in PARTS:
        assert not torch.equal(single[name, 0], single["stock", 0])
    wanted = [key for _ in range(3) for key in single]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda key: generate(calls[key[0]], BATCHES[key[1]]), wanted))
    for key, logits in zip(wanted, found, strict=True):
        assert torch.equal(logits, single[key]), key
    assert footprint(model) == before
    assert turns_of(model.model.language_model).waiting == 0


def test_an_attached_pipeline_that_waits_serves_a_thread_pool(model):
    with trio.Pipeline(model, **PARTS["both"], wait=True) as pipeline:
        single = [generate(model.generate, batch) for batch in BATCHES]
        forwards = [model(**batch).logits for batch in BATCHES]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: generate(model.generate, BATCHES[i % 4]), range(16)))
            rows = list(pool.map(lambda i: model(**BATCHES[i % 4]).logits, range(16)))
            own = list(pool.map(lambda i: generate(pipeline.generate, BATCHES[i % 4]), range(16)))
    for i in range(16):
        assert torch.equal(found[i], single[i % 4])
        assert torch.equal(own[i], single[i % 4])
        assert torch.equal(rows[i], forwards[i % 4])


def test_without_waiting_a_second_generate_is_refused_and_the_first_goes_on(model):
    with trio.Pipeline(model, **PARTS["stage"]):
        expected = generate(model.generate, BATCHES[0])
        gate = Gate(model)
        thread, results = in_thread(lambda: generate(model.generate, BATCHES[0]))
        assert gate.inside.wait(30)
        with pytest.raises(BusyError, match="wait=True"):
            generate(model.generate, BATCHES[0])
        gate.open.set()
        thread.join(30)
        assert torch.equal(results[0], expected)
        gate.remove()


def test_the_stock_model_runs_while_a_call_of_another_thread_compresses(model):
    stock = generate(model.generate, BATCHES[1])
    pipeline = trio.Pipeline(model, **PARTS["merging"])
    expected = generate(pipeline.generate, BATCHES[1])
    gate = Gate(model)
    thread, results = in_thread(lambda: generate(pipeline.generate, BATCHES[1]))
    assert gate.inside.wait(30)
    assert not pipeline.attached
    assert torch.equal(generate(model.generate, BATCHES[1]), stock)
    with pytest.raises(InputError, match="another thread's call"):
        pipeline.detach()
    with pytest.raises(BusyError):
        pipeline.attach()
    gate.open.set()
    thread.join(30)
    gate.remove()
    assert torch.equal(results[0], expected)


def test_hooks_that_come_and_go_leave_the_stock_model_of_other_threads_alone(model):
    """While the tower merges for one thread, hundreds of times, every forward of another is the stock model's."""
    stock = model(**BATCHES[3]).logits.detach()
    pipeline = trio.Pipeline(model, **PARTS["merging"])
    stop = threading.Event()

    def attaching() -> int:
        count = 0
        while not stop.is_set():
            with pipeline.in_this_thread():
                count += 1
        return count

    thread, results = in_thread(attaching)
    try:
        for _ in range(150):
            assert torch.equal(model(**BATCHES[3]).logits, stock)
    finally:
        stop.set()
        thread.join(30)
    assert isinstance(results[0], int) and results[0] > 100


def test_first_come_first_served(model):
    pipelines = [trio.Pipeline(model, **PARTS[name]) for name in ("stage", "dropping")]
    queue = turns_of(model.model.language_model)
    order: list[int] = []

    def request(number: int) -> None:
        with pipelines[number % 2].in_this_thread(wait=60):
            order.append(number)
            generate(model.generate, BATCHES[0])

    threads = []
    with pipelines[0].in_this_thread():
        for number in range(8):
            threads.append(in_thread(lambda number=number: request(number))[0])
            until(lambda number=number: queue.waiting == number + 2)
    for thread in threads:
        thread.join(60)
    assert order == list(range(8))


def test_a_report_within_the_block_is_of_the_blocks_own_call(model):
    pipeline = trio.Pipeline(model, **PARTS["stage"])

    def request(number: int) -> int:
        with pipeline.in_this_thread():
            generate(model.generate, BATCHES[number])
            return pipeline.report.samples[0].images[0].tokens if number < 3 else len(pipeline.report.samples[0].images)

    expected = [request(number) for number in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: request(i % 4), range(16))) == expected * 4


@pytest.mark.parametrize("wait", [False, 0.2])
def test_who_has_waited_long_enough_is_told_and_leaves_the_queue(model, wait):
    pipeline, other = (trio.Pipeline(model, **PARTS[name]) for name in ("stage", "both"))
    expected = generate(other.generate, BATCHES[0])
    gate = Gate(model)
    thread, _ = in_thread(lambda: generate(pipeline.generate, BATCHES[0]))
    assert gate.inside.wait(30)
    begin = time.monotonic()
    with pytest.raises(BusyError, match="another thread") as refused:
        generate(other.generate, BATCHES[0], wait=wait)
    assert isinstance(refused.value, TimeoutError) and isinstance(refused.value, InputError)
    assert float(wait) <= time.monotonic() - begin < 10
    assert turns_of(model.model.language_model).waiting == 1
    gate.open.set()
    thread.join(30)
    gate.remove()
    assert torch.equal(generate(other.generate, BATCHES[0], wait=wait), expected)


def test_an_error_in_a_call_ends_its_turn(model):
    before = footprint(model)
    pipeline = trio.Pipeline(model, **PARTS["both"])
    expected = generate(pipeline.generate, BATCHES[0])
    bad = {**BATCHES[0], "pixel_values": BATCHES[0]["pixel_values"] * float("nan")}
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(generate, pipeline.generate, bad if i % 2 else BATCHES[0]) for i in range(16)]
    for i, call in enumerate(calls):
        if i % 2:
            assert isinstance(call.exception(), trio.NonFiniteError)
        else:
            assert torch.equal(call.result(), expected)
    assert footprint(model) == before


@pytest.mark.parametrize("attached", [False, True], ids=["calls of their own", "attached"])
def test_after_an_interrupt_anywhere_other_threads_are_served(model, attached):
    before = footprint(model)
    pipeline = trio.Pipeline(model, **PARTS["stage"], wait=20)
    expected = generate(pipeline.generate, BATCHES[0])

    def call() -> torch.Tensor:
        return generate(model.generate if attached else pipeline.generate, BATCHES[0])

    if attached:
        pipeline.attach()
    total = lines_of(call)
    for line in range(1, total + 1, max(1, total // 30)):
        interrupted(call, line)
        if not attached and pipeline.attached:  # the interrupt came while it was to be taken off: this thread does it
            pipeline.detach()
        thread, results = in_thread(call)
        thread.join(30)
        assert results, f"interrupted at line {line} of {total}: not served"
        assert torch.equal(results[0], expected), f"interrupted at line {line} of {total}: {results[0]}"
        assert torch.equal(call(), expected)
    pipeline.detach()
    assert footprint(model) == before


def test_an_interrupted_wait_leaves_the_queue(model):
    pipeline = trio.Pipeline(model, **PARTS["stage"])
    queue = turns_of(model.model.language_model)
    gate = Gate(model)
    thread, _ = in_thread(lambda: generate(pipeline.generate, BATCHES[0]))
    assert gate.inside.wait(30)
    total = lines_of(lambda: _refused(pipeline))
    for line in range(1, total + 1, max(1, total // 60)):
        interrupted(lambda: _refused(pipeline), line)
        with pytest.raises(BusyError):
            pipeline.generate(**BATCHES[0], wait=False)
        assert queue.waiting == 1
    gate.open.set()
    thread.join(30)
    gate.remove()


def _refused(pipeline: trio.Pipeline) -> None:
    with pytest.raises(BusyError):
        pipeline.generate(**BATCHES[0], wait=0.01)


def test_a_thread_that_ends_in_its_block_does_not_keep_its_turn(model):
    pipeline, other = (trio.Pipeline(model, **PARTS[name]) for name in ("stage", "both"))
    expected = generate(other.generate, BATCHES[0])
    block = pipeline.in_this_thread()
    thread, _ = in_thread(block.__enter__)
    thread.join(30)
    assert torch.equal(generate(other.generate, BATCHES[0], wait=30), expected)
    del block
    gc.collect()
    assert torch.equal(generate(other.generate, BATCHES[0], wait=30), expected)


def test_one_block_in_another(model):
    pipeline, other = (trio.Pipeline(model, **PARTS[name]) for name in ("stage", "both"))
    expected = generate(pipeline.generate, BATCHES[0])
    with pipeline.in_this_thread():
        with pipeline.in_this_thread():
            assert torch.equal(generate(pipeline.generate, BATCHES[0]), expected)
        with pytest.raises(AttachError, match="already attached"):
            generate(other.generate, BATCHES[0])
        assert torch.equal(generate(model.generate, BATCHES[0]), expected)
        assert turns_of(model.model.language_model).waiting == 1
    with other, pytest.raises(AttachError, match="already attached"):
        generate(pipeline.generate, BATCHES[0])
    assert torch.equal(generate(pipeline.generate, BATCHES[0]), expected)


@pytest.mark.parametrize("wait", [-1, float("nan"), "long", None])
def test_a_wait_that_is_no_time(model, wait):
    with pytest.raises(InputError, match="wait: found"):
        trio.Pipeline(model, **PARTS["stage"], wait=wait)
    with pytest.raises(InputError, match="wait: found"):
        trio.Pipeline(model, **PARTS["stage"]).generate(**BATCHES[0], wait=wait)


def test_a_queue_forgets_turns_that_are_over():
    queue = Turns()
    thread, results = in_thread(lambda: queue.wait(Turn(), 5))
    thread.join(30)
    assert results == [True] and queue.waiting == 1
    turn = Turn()
    assert queue.wait(turn, 5)
    assert queue.has(turn) and queue.waiting == 1
    queue.leave(turn)
    queue.leave(turn)
    assert queue.waiting == 0


class Within:
    def __init__(self):
        self.inside, self.go = threading.Event(), threading.Event()

    def call(self):
        self.frame = frame_of(Within.call.__code__, self)
        self.inside.set()
        return self.go.wait(30)


def test_whether_a_call_of_another_thread_runs_is_asked_of_its_frame_alone():
    """Python 3.11 crashed where its callers were looked up while the other thread went on."""
    one, other = Within(), Within()
    thread, results = in_thread(one.call)
    assert one.inside.wait(30)
    assert is_running(one.frame) and is_running(one.frame)
    assert frame_of(Within.call.__code__, one) is None  # not in this thread
    one.go.set()
    thread.join(30)
    assert results == [True] and not is_running(one.frame)
    other.go.set()
    assert other.call() and not is_running(other.frame)
    package = Path(trio.__file__).parent
    assert not [file for file in package.rglob("*.py") if "_current_frames" in file.read_text(encoding="utf-8")]


def test_a_queue_goes_with_its_model():
    import weakref

    model = llava()
    reference = weakref.ref(turns_of(model.model.language_model))
    assert reference() is turns_of(model.model.language_model)
    del model
    gc.collect()
    assert reference() is None
