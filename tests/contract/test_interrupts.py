"""Interrupts while attaching and detaching, copies of an attached model, pipelines that are garbage."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from support.families import family
from support.interrupts import interrupted, lines_of
from support.models import inputs, llava

import trio
from trio.errors import InputError
from trio.testing import Prompt
from trio.testing.promises.reversibility import footprint

pytestmark = pytest.mark.contract

BATCH = inputs([[5, "image", 6, 7], [8, "image", "image", 9, 10, 11]])
COMPRESSED = {"stages": [trio.Stage(after_layer=1, keep="50%")], "compressor": {"name": "visionzip", "keep": "60%"}}
MERGING = {"compressor": {"name": "tome", "keep": "60%"}}


@pytest.fixture
def model():
    model = llava()
    run(model)  # transformers leaves capture hooks of its own at a first call
    return model


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("parts", [COMPRESSED, MERGING], ids=["stages and compressor", "merging in the tower"])
def test_after_an_interrupt_anywhere_in_attach_one_detach_restores_the_model(model, parts):
    stock, before = run(model), footprint(model)
    pipeline = trio.Pipeline(model, **parts)
    total = lines_of(pipeline.attach)
    pipeline.detach()
    hits = 0
    for line in range(1, total + 1, max(1, total // 60)):
        hits += interrupted(pipeline.attach, line)
        attached = pipeline.attached
        pipeline.detach()
        assert footprint(model) == before, f"interrupted at line {line} of {total}"
        assert not pipeline.attached
        assert attached is False or line > total - 10  # never "attached" over half of the hooks
    assert hits > 50
    assert torch.equal(run(model), stock)


@pytest.mark.parametrize("parts", [COMPRESSED, MERGING], ids=["stages and compressor", "merging in the tower"])
def test_after_an_interrupt_anywhere_the_next_attach_works_without_a_detach(model, parts):
    stock = run(model)
    pipeline = trio.Pipeline(model, **parts)
    with pipeline:
        expected = run(model)
        total = lines_of(pipeline.detach)
    assert not torch.equal(expected, stock)
    for line in range(1, total + 1, max(1, total // 40)):
        pipeline.attach()
        interrupted(pipeline.detach, line)
        if not pipeline.attached:
            assert torch.equal(run(model), stock), f"half detached at line {line} of {total}"
            pipeline.attach()
        assert torch.equal(run(model), expected), f"interrupted at line {line} of {total}"
        pipeline.detach()
        assert torch.equal(run(model), stock)


def test_an_interrupt_while_attaching_does_not_disturb_another_pipeline(model):
    stock, before = run(model), footprint(model)
    first, second = trio.Pipeline(model, **MERGING), trio.Pipeline(model, **COMPRESSED)
    with second:
        expected = run(model)
    total = lines_of(first.attach)
    first.detach()
    for line in range(1, total, max(1, total // 30)):
        interrupted(first.attach, line)
        if first.attached:
            first.detach()
        with second:
            assert torch.equal(run(model), expected), f"interrupted at line {line} of {total}"
        assert torch.equal(run(model), stock)
    first.detach()
    assert footprint(model) == before


def test_an_interrupted_forward_leaves_nothing_that_the_next_one_trips_over(model):
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%")])
    with pipeline:
        expected = run(model)
        total = lines_of(lambda: run(model))
        for line in range(1, total, max(1, total // 40)):
            interrupted(lambda: run(model), line)
            assert torch.equal(run(model), expected), f"interrupted at line {line} of {total}"
    assert not pipeline.attached


def test_a_pipeline_that_is_garbage_takes_its_hooks_with_it_and_says_so(model):
    stock, before = run(model), footprint(model)
    for parts in (COMPRESSED, MERGING):
        pipeline = trio.Pipeline(model, **parts).attach()
        assert not torch.equal(run(model), stock)
        with pytest.warns(RuntimeWarning, match="keep the pipeline in a variable"):
            del pipeline
            gc.collect()
        assert footprint(model) == before
        assert torch.equal(run(model), stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = trio.Pipeline(model, **COMPRESSED)
        with pipeline:
            run(model)
        del pipeline
        gc.collect()


def test_a_model_is_not_kept_alive_by_a_pipeline_that_is_gone():
    import weakref

    model = llava()
    there = weakref.ref(model)
    pipeline = trio.Pipeline(model, **COMPRESSED)
    with pipeline:
        run(model)
    del pipeline, model
    gc.collect()
    assert there() is None


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("parts", [COMPRESSED, MERGING], ids=["stages and compressor", "merging in the tower"])
def test_a_copy_of_an_attached_model_is_the_stock_model(model, copied, parts):
    stock = run(model)
    tokens = model.generate(**BATCH, max_new_tokens=3, do_sample=False)
    fresh = llava()  # the same weights; after a first call transformers' own capture hooks cannot be pickled
    pipeline = trio.Pipeline(fresh, **parts)
    with pipeline:
        twin = copied(fresh)
        expected = run(fresh)
        reports = len(pipeline.reports)
        assert not torch.equal(expected, stock)
        assert torch.equal(run(twin), stock)
        assert torch.equal(twin.generate(**BATCH, max_new_tokens=3, do_sample=False), tokens)
        assert len(pipeline.reports) == reports, "the copy told the original's pipeline"
        other = trio.Pipeline(twin, **parts)
        with other:
            assert torch.equal(run(twin), expected)
        assert torch.equal(run(twin), stock)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(run(fresh), expected)
    assert torch.equal(run(fresh), stock)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-onevision"])
def test_copies_of_other_families(name):
    model, make = family(name)
    batch = make([Prompt("what is", 1, "in here ?")])
    with torch.no_grad():
        stock = model(**batch).logits
        with trio.Pipeline(model, **{**COMPRESSED, "compressor": {"name": "divprune", "keep": "60%"}}):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(**batch).logits, stock)
            assert not torch.equal(model(**batch).logits, stock)


def test_a_pipeline_refuses_to_be_copied_and_its_spec_does_not(model):
    pipeline = trio.Pipeline.from_spec("trio-soft-11", model)
    for refused in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="from_spec"):
            refused(pipeline)
    again = trio.Pipeline.from_spec(pickle.loads(pickle.dumps(pipeline.spec)), model)
    assert again.spec == pipeline.spec


def test_detach_within_a_running_forward_is_refused(model):
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%")])
    said = []

    def detaching(module: Any, args: Any) -> None:
        with pytest.raises(InputError, match="in the middle of a forward") as refused:
            pipeline.detach()
        said.append(refused.value)

    handle = pipeline.adapter.layers[3].register_forward_pre_hook(detaching)
    with pipeline:
        expected = run(model)
        handle.remove()
        assert torch.equal(run(model), expected)
    assert len(said) == 1


def test_detach_while_another_thread_runs_a_forward_is_refused(model):
    pipeline = trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%")])
    inside, done = threading.Event(), threading.Event()

    def waiting(module: Any, args: Any) -> None:
        inside.set()
        done.wait(30)

    handle = pipeline.adapter.layers[3].register_forward_pre_hook(waiting)
    with pipeline:
        thread = threading.Thread(target=run, args=(model,))
        thread.start()
        assert inside.wait(30)
        with pytest.raises(InputError, match="in the middle of a forward"):
            pipeline.detach()
        done.set()
        thread.join()
        handle.remove()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda mask: mask[:, 3:], "the forward brings 2 samples of"),
        (lambda mask: mask[:1], "the forward brings 2 samples of"),
        (torch.zeros_like, "no token that is not padding"),
        (lambda mask: mask * torch.tensor([[1], [0]]), "sample 1 has no token"),
    ],
    ids=["shorter than the ids", "fewer samples", "zeros", "zeros for one sample"],
)
def test_masks_that_do_not_fit_the_ids_are_refused(model, change, says):
    wrong = {**BATCH, "attention_mask": change(BATCH["attention_mask"])}
    with (
        trio.Pipeline(model, stages=[trio.Stage(after_layer=1, keep="50%")]),
        pytest.raises(InputError, match=says),
        torch.no_grad(),
    ):
        model.model(**wrong)
