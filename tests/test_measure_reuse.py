"""Images encoded once for several specs, and batches prepared beside the model: the same answers, less work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, family

import trio
from trio import zoo
from trio.adapters import adapter_for
from trio.core.hooking import patches_on
from trio.core.prompts import Prompt
from trio.errors import InputError
from trio.measure.ahead import prepared
from trio.measure.answering import GreedyAnswerer
from trio.measure.encoding import EncodedImages
from trio.measure.evaluation.answers import AnswerFiles
from trio.measure.evaluation.rows import plan
from trio.measure.evaluation.runner import Runner
from trio.measure.fidelity import PromptSample, measure
from trio.measure.fidelity.floor import random_floor
from trio.measure.shapesvqa.examples import examples
from trio.measure.shapesvqa.task import canvas_for, shapesvqa
from trio.measure.teacher import forced_logits
from trio.measure.tuning.trials import Judge
from trio.spec import load_spec

pytestmark = pytest.mark.filterwarnings("ignore:no adapter knows")
MODELS = ["tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl"]
STAGES: dict[str, Any] = {"version": 1, "name": "stages", "stages": [{"after_layer": 1, "keep": "30%"}]}
EARLY: dict[str, Any] = {"version": 1, "name": "early", "compressor": {"name": "divprune", "keep": "20%"}}
READING: dict[str, Any] = {"version": 1, "name": "reading", "compressor": {"name": "visionzip", "keep": "20%"}}
#: Compressors that read the tower's attention at a block that the tiny towers have.
SPECS = [STAGES, EARLY, READING]
PROMPTS = [Prompt("what is", 1, "this thing or that"), Prompt("now", 2, "and", 3, "differ in what")]


def asked(count: int = 5) -> list[PromptSample]:
    return [PromptSample(e.image, e.question, f"scene {e.scene}") for e in examples("validation", 5, 2)][:count]


def encoder_calls(model: Any) -> list[float]:
    """Filled at each run of the vision tower."""
    calls: list[float] = []
    adapter_for(model).vision_tower.register_forward_hook(lambda *_: calls.append(time.perf_counter()))
    return calls


# The memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_logits_from_encoded_images(name: str) -> None:
    model, make = family(name)
    inputs = make(PROMPTS)
    full = trio.Pipeline(model, stages=[{"after_layer": 0, "keep": "100%"}])
    pipelines = [None, full, *(trio.Pipeline.from_spec(spec, model) for spec in (STAGES, EARLY))]
    memory = EncodedImages(full.adapter)
    for pipeline in [*pipelines, *pipelines]:  # a second time: nobody has changed what is kept
        with torch.no_grad():
            with memory.reused(pipeline):
                if pipeline is None:
                    found = model(**inputs).logits
                else:
                    with pipeline:
                        found = model(**inputs).logits
            kept = None if pipeline is None else pipeline.report.selection()
            if pipeline is None:
                alone = model(**inputs).logits
            else:
                with pipeline:
                    alone = model(**inputs).logits
                assert pipeline.report.selection() == kept
        assert torch.equal(found, alone)
        assert not list(patches_on(model))
    assert memory.encoded == 1
    assert memory.kept_bytes > 0


def test_other_images_are_encoded() -> None:
    model, make = family("llava")
    first, second = make(PROMPTS), make(PROMPTS[::-1])
    memory = EncodedImages(adapter_for(model))
    with torch.no_grad(), memory.reused(None):
        seen = [model(**inputs).logits for inputs in (first, second, first, second)]
    assert memory.encoded == 2
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    with torch.no_grad():
        assert torch.equal(seen[1], model(**second).logits)
    memory.clear()
    assert memory.kept_bytes == 0
    with torch.no_grad(), memory.reused(None):
        model(**first)
    assert memory.encoded == 3


def test_memory_is_bounded_and_keeps_what_it_has() -> None:
    model, make = family("llava")
    batches = [make(PROMPTS), make(PROMPTS[::-1]), make(PROMPTS)]
    whole = EncodedImages(adapter_for(model))
    with torch.no_grad(), whole.reused(None):
        model(**batches[0])
    one = whole.kept_bytes
    width = model.config.text_config.hidden_size
    assert one >= 3 * 16 * width * 4  # three images of 16 tokens in float32
    memory = EncodedImages(adapter_for(model), limit=2 * one)
    with torch.no_grad(), memory.reused(None):
        for _ in range(4):
            for batch in batches:
                model(**batch)
    assert memory.kept_bytes == 2 * one
    assert memory.encoded == 3 + 3  # the third each time
    none = EncodedImages(adapter_for(model), limit=0)
    with torch.no_grad(), none.reused(None):
        for _ in range(2):
            model(**batches[0])
    assert (none.encoded, none.kept_bytes, none.saved_seconds) == (2, 0, 0.0)


def test_what_the_tower_saw_on_its_way_is_not_kept() -> None:
    model, make = family("llava")
    inputs = make(PROMPTS)
    outputs: list[Any] = []
    memory = EncodedImages(adapter_for(model))
    tower = adapter_for(model).vision_tower
    tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), memory.reused(None):
        model(**inputs)
    (output,) = outputs
    assert sum(state.nbytes for state in output.hidden_states if state is not None) > 0
    width, rows = model.config.text_config.hidden_size, 3 * 16
    projected = rows * width * 4
    assert memory.kept_bytes == projected + output.last_hidden_state.nbytes


def test_what_raises_leaves_nothing_on_the_model() -> None:
    model, _ = family("llava")
    memory = EncodedImages(adapter_for(model))
    with pytest.raises(RuntimeError, match="stop"), memory.reused(None):
        assert list(patches_on(model))
        raise RuntimeError("stop")
    assert not list(patches_on(model))


# The tools -----------------------------------------------------------------------------------------------------------


def without_times(report: Any) -> dict[str, Any]:
    """A report as plain data without what a clock says."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if key not in ("seconds", "speedup", "full")}
        return [strip(one) for one in value] if isinstance(value, list) else value

    plain = report.model_dump(mode="json")
    texts = [one["full"] for one in plain["asked"]]  # answers of the full model, not its times
    return {**strip(plain), "texts": texts}


@pytest.mark.parametrize("name", MODELS)
def test_fidelity_is_the_same_with_and_without_reuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = zoo.load(name)
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 2}
    calls = encoder_calls(model)
    forced: list[int] = []  # runs of the tower while answers that differ are compared position by position

    def counted(*args: Any) -> torch.Tensor:
        before = len(calls)
        logits = forced_logits(*args)
        forced.append(len(calls) - before)
        return logits

    monkeypatch.setattr(sys.modules[measure.__module__], "forced_logits", counted)
    reused = measure(model, processor, SPECS, asked(), **options)
    runs, fewer = len(forced), len(calls) - sum(forced)
    calls.clear()
    forced.clear()
    anew = measure(model, processor, SPECS, asked(), encoded_bytes=0, **options)
    assert len(forced) == runs > 0 and 0 not in forced
    assert without_times(reused) == without_times(anew)
    assert len(reused.asked) == 5
    turns = 1 + 3 + (3 - 2)  # unmeasured; a batch each; one more, because the shorter last batch is not timed
    specs = [load_spec(spec) for spec in SPECS]
    ways = [*specs, *map(random_floor, specs)]
    reading = sum(trio.Pipeline.from_spec(way, model).reads_tower for way in ways)
    assert 1 <= reading <= 4  # stages and their floor read nothing
    # What costs as much is found in the first turn: pooled in the tower one by one, or smaller images, each size once.
    equal = [row.equal_cost.spec for row in reused.results if row.equal_cost is not None]
    assert len(equal) == len(specs)
    own = len({str(spec["resize"]) for spec in equal}) if "resize" in equal[0] else len(equal)
    once, always = (turns * (1 + number) for number in (reading, len(ways)))
    assert (fewer, len(calls) - sum(forced)) == (once + own * (turns - 1), always + len(equal) * (turns - 1))


def test_times_have_the_encoder_in_them_wherever_it_ran() -> None:
    model, processor = zoo.load("tiny-llava")
    adapter_for(model).vision_tower.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    answerer = GreedyAnswerer(model, processor, max_new_tokens=2)
    inputs = answerer.inputs([one.question() for one in asked(2)])
    memory = EncodedImages(answerer.adapter)
    for pipeline in (None, trio.Pipeline.from_spec(STAGES, model), None):
        start = time.perf_counter()
        answers = answerer(inputs, pipeline, memory=memory)
        wall = time.perf_counter() - start
        assert 0.3 <= answers.first_token <= answers.answer
    assert answers.answer > wall  # the last one did not sleep
    assert memory.saved_seconds >= 0.6


@pytest.mark.parametrize("name", MODELS)
def test_a_trial_of_a_search_is_the_same_with_and_without_reuse(name: str) -> None:
    model, processor = zoo.load(name)
    answerer = GreedyAnswerer(model, processor, max_new_tokens=2)
    calls = encoder_calls(model)
    found, runs = [], []
    for limit in (2**30, 0):
        calls.clear()
        judge = Judge(answerer, asked(), batch_size=2, timed=False, encoded_bytes=limit)
        found.append([judge.tokens, *(judge.judge(load_spec(spec)) for spec in SPECS)])
        runs.append(len(calls))
    assert found[0] == found[1]
    reading = sum(trio.Pipeline.from_spec(spec, model).reads_tower for spec in SPECS)
    assert runs == [3 + 3 * reading, 3 + 1 + 3 * len(SPECS)]  # three batches; one is asked for its tokens


@pytest.mark.parametrize("name", MODELS)
def test_an_evaluation_is_the_same_with_and_without_reuse_and_where_it_goes_on(name: str, tmp_path: Path) -> None:
    model, processor = zoo.load(name)
    task = shapesvqa("validation", limit=1, canvas=canvas_for(model))
    specs = [load_spec(spec) for spec in (STAGES, READING)]
    smallest = Runner(model, processor, task, 3).smallest()
    rows, _ = plan(model, specs, 64, several_images=False, maps=True, smallest=smallest)
    rows = [row for row in rows if not row.refused]
    assert {row.image for row in rows} >= ({"own", "blank", "small"} if "qwen" in name else {"own", "blank"})
    answers = []
    for limit in (2**30, 0):
        runner = Runner(model, processor, task, 3, encoded_bytes=limit)
        answers.append(runner.run(rows, AnswerFiles(tmp_path / str(limit), {})))
    assert answers[0] == answers[1]
    for file in (tmp_path / str(2**30) / "answers").iterdir():  # as if stopped in the first batch of half of the rows
        if int(file.stem[-1], 16) % 2:
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    runner = Runner(model, processor, task, 3)
    assert runner.run(rows, AnswerFiles(tmp_path / str(2**30), {})) == answers[0]


# Prepared beside the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_come_in_order_and_not_too_far_ahead(ahead: int) -> None:
    made: list[int] = []
    threads: set[int] = set()

    def prepare(item: int) -> int:
        threads.add(threading.get_ident())
        made.append(item)
        return item * item

    got = []
    for number, value in enumerate(prepared(prepare, range(8), ahead=ahead)):
        got.append(value)
        assert len(made) <= number + 1 + ahead
    assert got == [item * item for item in range(8)]
    assert made == list(range(8))
    assert (threading.get_ident() in threads) == (ahead == 0) and len(threads) == 1


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    second = threading.Event()

    def prepare(item: int) -> int:
        if item == 1:
            second.set()
        return item

    coming = prepared(prepare, range(3))
    assert next(coming) == 0
    assert second.wait(10)
    assert list(coming) == [1, 2]


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_when_its_turn_comes(ahead: int) -> None:
    def prepare(item: int) -> int:
        if item == 1:
            raise InputError("image 'b.png': damaged")
        return item

    coming = prepared(prepare, range(5), ahead=ahead)
    assert next(coming) == 0
    with pytest.raises(InputError, match=r"b\.png"):
        next(coming)


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_items_comes_when_its_turn_comes(ahead: int) -> None:
    """And they are taken in the thread that prepares: reading a table is work, too."""
    threads: set[int] = set()

    def items() -> Iterator[int]:
        threads.add(threading.get_ident())
        yield from range(2)
        raise InputError("table 'a.parquet': damaged")

    coming = prepared(lambda item: -item, items(), ahead=ahead)
    assert [next(coming), next(coming)] == [0, -1]
    with pytest.raises(InputError, match="damaged"):
        next(coming)
    assert (threads == {threading.get_ident()}) == (ahead == 0)


def test_nothing_is_prepared_behind_an_interrupt() -> None:
    made: list[int] = []
    coming = prepared(made.append, range(100), ahead=2)
    next(coming)
    coming.close()
    count = len(made)
    time.sleep(0.05)
    assert count == len(made) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trio-prepare")]
