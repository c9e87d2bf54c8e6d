"""The oracle agrees with the runtime on every family, and with nothing that is wrong: faults put in on purpose."""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.bench import bench as llava_bench
from support.families import FAMILIES, family
from support.models import llava

import trio
import trio.testing.oracle
import trio.testing.stock
import trio.testing.survivors
from trio.adapters import adapter_for
from trio.core.upstream import Role, dynamic_cache, keywords
from trio.report import CompressionReport
from trio.testing.adapters import TOLERANCES
from trio.testing.bench import AT_INPUT, RAGGED, TWO_STAGES, Bench, Setting
from trio.testing.oracle import compact_logits, kept_columns, masked_logits
from trio.testing.promises.oracle import Compressed, agreement, compressed, oracle
from trio.testing.promises.reversibility import footprint

pytestmark = [pytest.mark.contract, pytest.mark.filterwarnings("ignore:no adapter knows")]

STAGES = {name: Setting(name, TWO_STAGES, name) for name in ("original", "compact")}


@cache
def bench_of(name, dtype=torch.float32):
    model, make = family(name, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no adapter knows")
        adapter = adapter_for(model)
    return Bench(model, make, adapter, TOLERANCES[dtype], dtype == torch.float32, (STAGES["original"],), ())


FORMS = [(name, form) for name in FAMILIES for form in STAGES if form in bench_of(name).adapter.allowed_positions]
forms = pytest.mark.parametrize(("name", "positions"), FORMS)


@cache
def run_of(name, positions, side="left"):
    work = bench_of(name)
    return work, compressed(work, STAGES[positions], RAGGED, side)


def merging(name, positions):
    """A compressor that merges in front of a stage: what it leaves may stand at other tokens' places."""
    reads_tower = {"attention", "keys"} <= bench_of(name).adapter.tower_offers()
    compressor = {"name": "visionzip" if reads_tower else "average-pool", "keep": "60%"}
    return Setting("merged", TWO_STAGES[1:], positions, compressor)


# What is right


@forms
def test_every_family_agrees(name, positions):
    work, run = run_of(name, positions)
    found = agreement(work, run)
    assert "4 steps" in found
    assert ("renumbered" in found) == (positions == "compact")


@forms
def test_merged_tokens_agree(name, positions):
    work = bench_of(name)
    run = compressed(work, merging(name, positions), RAGGED)
    assert any(
        "merged" in image.origins.kind for s in run.report.samples if s.compressor for image in s.compressor.images
    )
    agreement(work, run)


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen3-vl"])
def test_half_precision(name):
    work = bench_of(name, torch.bfloat16)
    agreement(work, compressed(work, STAGES["original"], RAGGED))


@pytest.mark.parametrize("positions", STAGES)
def test_a_window_counts_the_tokens_that_are_left(positions):
    windows = {"use_sliding_window": True, "max_window_layers": 3}
    work = llava_bench(llava("qwen2", sliding_window=12, **windows))
    assert [work.adapter.window(layer) for layer in range(6)] == [None, None, None, 12, 12, 12]
    setting = Setting("windows", TWO_STAGES, positions)
    for side in ("left", "right"):
        inputs = work.inputs(*RAGGED, side=side)
        pipeline = work.pipeline(setting)
        with pipeline:
            prefill = work.forward(inputs)
            report = pipeline.report
            run = Compressed(inputs, side, positions == "compact", report, None, prefill, inputs["input_ids"])
            if side == "left":
                with pipeline.replay(report):
                    out = work.generate(inputs, **keywords({Role.CACHE: dynamic_cache()}))
                run = replace(run, sequences=out.sequences[:, :-1], steps=torch.stack(out.logits, 1))
        agreement(work, run)
    wide = llava_bench(llava("qwen2", sliding_window=64, **windows))
    with pytest.raises(AssertionError, match="logits differ"):
        agreement(wide, run)


# What is wrong


def edited(report, edit):
    """A copy of a report, its plain data changed."""
    data = report.model_dump()
    edit(data)
    return CompressionReport.model_validate(data)


def one_other_token(data):
    """The last stage of the first sample keeps another token, which the stage in front of it kept too."""
    first, last = (stage["groups"][0] for stage in data["samples"][0]["stages"])
    spare = [index for index in first["indices"] if index not in last["indices"]]
    last["indices"] = sorted([*last["indices"][1:], spare[-1]])


@forms
def test_another_token_than_reported(name, positions):
    work, run = run_of(name, positions)
    wrong = edited(run.report, one_other_token)
    with pytest.raises((AssertionError, trio.InputError), match=r"sample 0, prefill: logits differ|newline tokens"):
        agreement(work, replace(run, report=wrong))


@forms
def test_a_stage_one_layer_later_than_reported(name, positions):
    work, run = run_of(name, positions)

    def later(data):
        for sample in data["samples"]:
            for stage in sample["stages"][-1:]:
                stage["after_layer"] += 1

    with pytest.raises(AssertionError, match="logits differ"):
        agreement(work, replace(run, report=edited(run.report, later)))


@pytest.mark.parametrize("positions", STAGES)
def test_the_other_numbering(positions):
    work, run = run_of("llava", positions)
    with pytest.raises(AssertionError, match="logits differ"):
        agreement(work, replace(run, compact=not run.compact))


@forms
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_decoded_step_that_saw_one_token_less(name, positions, step):
    """What a cache of a stale length gives: the step before once more."""
    work, run = run_of(name, positions)
    steps = run.steps.clone()
    steps[1, step] = run.steps[1, step - 1]
    with pytest.raises(AssertionError, match=f"sample 1, step {step} of generation: logits differ"):
        agreement(work, replace(run, steps=steps))


@forms
def test_logits_of_one_row_only(name, positions):
    """No row of the prefill goes unseen, whatever sample and column it is of."""
    work, run = run_of(name, positions, "right")
    expected = oracle(work, run)
    for sample, logits in enumerate(expected):
        for row in (0, len(logits) // 2, len(logits) - 1):
            prefill = run.prefill.clone()
            prefill[sample, row] *= 1 + 1e-3
            with pytest.raises(AssertionError, match=f"sample {sample}, prefill"):
                close_to(work, replace(run, prefill=prefill), expected)


def close_to(work, run, expected):
    """`agreement` with the oracle's logits at hand, which one row does not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio.testing.promises.oracle.oracle", lambda *_: expected)
        agreement(work, run)


def shifted(layer, args, kwargs):
    """Each token with the position of its neighbour; the single token of a later step with the one before its own."""
    cos, sin = kwargs["position_embeddings"]
    if args[0].shape[1] > 1:
        return args, {**kwargs, "position_embeddings": (cos.roll(1, 1), sin.roll(1, 1))}
    return back_by_one(args, kwargs)


def stale(layer, args, kwargs):
    """Positions of later steps one too low, as from a cache that says that it holds one token less."""
    return back_by_one(args, kwargs) if args[0].shape[1] == 1 else None


def back_by_one(args, kwargs):
    (cos, sin), (one_cos, one_sin) = kwargs["position_embeddings"], one_position()
    turned = (cos * one_cos + sin * one_sin, sin * one_cos - cos * one_sin)
    return args, {**kwargs, "position_embeddings": turned}


@cache
def one_position():
    """Rotary embeddings of position 1."""
    with torch.no_grad():
        return llava().model.language_model.rotary_emb(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.long))


def masked_one_off(layer, args, kwargs):
    """A mask that is off by one column."""
    if kwargs["attention_mask"] is None:
        return None
    return args, {**kwargs, "attention_mask": kwargs["attention_mask"].roll(1, -1)}


def one_key_too_many(layer, args, kwargs):
    """The first of the columns that are there is hidden, in later steps only."""
    mask = kwargs["attention_mask"]
    if args[0].shape[1] > 1 or mask is None:
        return None
    mask = mask.clone()
    first = (mask if mask.dtype == torch.bool else mask == 0).int().argmax(-1, keepdim=True)
    return args, {**kwargs, "attention_mask": mask.scatter(-1, first, False if mask.dtype == torch.bool else -1e30)}


@pytest.mark.parametrize("positions", STAGES)
@pytest.mark.parametrize(
    ("fault", "where"),
    [(shifted, "prefill"), (stale, "step 1"), (masked_one_off, "prefill"), (one_key_too_many, "step 1")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_runtime_that_errs_behind_its_stages(fault, where, positions, monkeypatch):
    """Hooks behind the runtime's own change what it hands to one layer behind both stages."""
    work = llava_bench(llava())
    attach = trio.Pipeline.attach

    def attached(self):
        attach(self)
        handles.append(work.adapter.layers[4].register_forward_pre_hook(fault, with_kwargs=True))
        return self

    handles = []
    monkeypatch.setattr(trio.Pipeline, "attach", attached)
    run = compressed(work, STAGES[positions], RAGGED)
    for handle in handles:
        handle.remove()
    with pytest.raises(AssertionError, match=f"sample 0, {where}.*logits differ"):
        agreement(work, run)


@forms
def test_merged_features_at_each_others_places(name, positions):
    work = bench_of(name)
    run = compressed(work, merging(name, positions), RAGGED)
    image = run.report.samples[0].compressor.images[0]
    assert image.kept > 1
    first = run.entered.shape[1] - run.report.layer_tokens[0][0] + visual_start(work, run)
    swapped = run.entered.clone()
    swapped[0, [first, first + 1]] = run.entered[0, [first + 1, first]]
    with pytest.raises(AssertionError, match="sample 0, prefill: logits differ"):
        agreement(work, replace(run, entered=swapped))
    with pytest.raises(AssertionError, match="sample 0: what entered the first decoder layer"):
        agreement(work, replace(run, entered=run.entered.roll(1, 1)))


def visual_start(work, run):
    """Tokens of the first sample in front of its image."""
    ids, valid = run.inputs["input_ids"][0], run.inputs["attention_mask"][0].bool()
    return int((ids[valid] == work.adapter.model.config.image_token_id).int().argmax())


def test_later_features_of_other_members():
    """Qwen3-VL adds features between layers, which merge as the tokens did."""
    work = bench_of("qwen3-vl")
    run = compressed(work, merging("qwen3-vl", "original"), RAGGED)

    def alone(data):
        for sample in data["samples"]:
            for image in (sample["compressor"] or {"images": []})["images"]:
                image["merged"] = [n if n in image["indices"] else -1 for n in range(image["tokens_in"])]

    with pytest.raises(AssertionError, match="prefill: logits differ"):
        agreement(work, replace(run, report=edited(run.report, alone)))


def test_newlines_that_go_with_no_row():
    work, run = run_of("llava-next", "original")

    def fewer(data):
        data["samples"][0]["stages"][1]["newlines"] -= 1

    with pytest.raises(trio.InputError, match=r"newline tokens from layer 3 on.*newlines: with-row"):
        agreement(work, replace(run, report=edited(run.report, fewer)))
    pipeline = trio.Pipeline(work.model, stages=TWO_STAGES, newlines="always")
    with pipeline:
        work.forward(run.inputs)
    with pytest.raises(trio.InputError, match="newlines: with-row"):
        kept_columns(work.model, work.adapter, run.inputs, pipeline.report)


# By itself


def test_it_shares_nothing_with_the_runtime():
    """Its imports of the package at run time: errors, and a switch for the model's attention."""
    own = {"trio.testing.stock", "trio.testing.survivors"}
    for module in (trio.testing.oracle, trio.testing.survivors, trio.testing.stock):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        found = {(node.module, name.name) for node in imports for name in node.names if node.module not in own}
        names = {name for source, name in found if source.startswith(("trio", "transformers"))}
        assert names <= {"InputError", "UnsupportedModelError", "attention_of"}


def test_nothing_dropped_is_the_stock_model():
    work, run = run_of("llava", "original")
    stock = masked_logits(work.model, work.adapter, run.inputs, {})
    everything = {0: run.inputs["attention_mask"].bool()}
    torch.testing.assert_close(masked_logits(work.model, work.adapter, run.inputs, everything), stock)
    torch.testing.assert_close(stock[everything[0]], work.forward(run.inputs)[everything[0]], rtol=1e-5, atol=1e-5)
    by_hand = compact_logits(work.model, work.adapter, run.inputs, everything)
    for rows, logits, there in zip(by_hand, stock, everything[0], strict=True):
        torch.testing.assert_close(rows, logits[there], rtol=1e-5, atol=1e-5)


def test_a_hidden_token_is_a_token_that_is_not_there():
    """Text hidden from layer 0 on: the forward of a prompt without it, at the positions that it had."""
    work = llava_bench(llava())
    inputs = work.inputs(RAGGED[2])
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[0, [2, 3, 7]] = False
    logits = masked_logits(work.model, work.adapter, inputs, {0: keep})
    shorter = {"input_ids": inputs["input_ids"][keep][None], "attention_mask": torch.ones(1, int(keep.sum()))}
    expected = work.forward(shorter, position_ids=keep.nonzero()[:, 1][None])
    torch.testing.assert_close(logits[keep][None], expected, rtol=1e-5, atol=1e-5)
    (rows,) = compact_logits(work.model, work.adapter, inputs, {0: keep})
    torch.testing.assert_close(rows[None], work.forward(shorter), rtol=1e-5, atol=1e-5)


def test_the_model_is_as_before():
    work = llava_bench(llava())
    inputs = work.inputs(*RAGGED)
    stock = work.forward(inputs)
    work.forward(inputs)
    before = footprint(work.model)
    keep = {2: inputs["attention_mask"].bool()}
    masked_logits(work.model, work.adapter, inputs, keep)
    compact_logits(work.model, work.adapter, inputs, keep)
    with pytest.raises(trio.InputError, match="detach the pipeline"), work.pipeline(Setting("first", AT_INPUT)):
        masked_logits(work.model, work.adapter, inputs, keep)
    assert footprint(work.model) == before
    assert torch.equal(work.forward(inputs), stock)


def test_what_does_not_fit_is_refused():
    work, run = run_of("llava", "original")
    valid = run.inputs["attention_mask"].bool()
    gone = valid.clone()
    gone[0, -1] = False
    for kept, message in (
        ({9: valid}, "no layer 9; the model has layers 0 to 5"),
        ({1: valid[:, :-1]}, r"kept_by_layer\[1\]: found torch.bool"),
        ({1: valid.long()}, r"kept_by_layer\[1\]: found torch.int64"),
        ({1: gone, 3: valid}, r"kept_by_layer\[3\]: sample 0 has column \d+ again"),
    ):
        for run_it in (masked_logits, compact_logits):
            with pytest.raises(trio.InputError, match=message):
                run_it(work.model, work.adapter, run.inputs, kept)
    with pytest.raises(trio.InputError, match="the inputs have 0 placeholders"):
        kept_columns(work.model, work.adapter, work.inputs(*[RAGGED[2]] * 4), run.report)
    other, own = run_of("qwen3-vl", "original")
    with pytest.raises(trio.UnsupportedModelError, match="use masked_logits"):
        compact_logits(other.model, other.adapter, own.inputs, {})
    with pytest.raises(trio.InputError, match="report: it has 4 samples, the inputs have 1"):
        kept_columns(work.model, work.adapter, work.inputs(RAGGED[0]), run.report)
    with pytest.raises(trio.InputError, match=r"attention_mask: found \(1, 1, 3, 3\), expected \(1, 3\)"):
        masked_logits(
            work.model,
            work.adapter,
            {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 1, 3, 3)},
            {},
        )


def test_the_example_of_the_page():
    page = Path(__file__).parents[2] / "docs" / "testing.md"
    (code,) = [
        block.partition("```")[0]
        for block in page.read_text(encoding="utf-8").split("```python\n")[1:]
        if "masked_logits" in block.partition("```")[0]
    ]
    work = llava_bench(llava())
    names = {"model": work.model, "inputs": work.inputs(RAGGED[0]), "pipeline": work.pipeline()}
    exec(compile(code, str(page), "exec"), names)
    torch.testing.assert_close(names["logits"][0, -1], names["expected"][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 4}),
        ("mistral", {"sliding_window": 12}),
    ],
    ids=[
        "windows between two stages",
        "windows behind a stage",
        "a window in every layer, known from the configuration",
    ],
)
def test_windows_wherever_the_stages_stand(text, more):
    """Full and windowed layers behind one stage each get their own mask."""
    work = llava_bench(llava(text, **more))
    inputs = work.inputs(*RAGGED)
    for stages in ((1, 3), (0, 2), (3, 5)):
        keeps = ("60%", "40%")
        setting = Setting("windows", [{"after_layer": n, "keep": k} for n, k in zip(stages, keeps, strict=True)])
        pipeline = work.pipeline(setting)
        with pipeline:
            prefill = work.forward(inputs)
        agreement(work, Compressed(inputs, "left", False, pipeline.report, None, prefill, inputs["input_ids"]))
