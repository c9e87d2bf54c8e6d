"""vLLM itself, on the CPU, with the plugin: parity with transformers, keys, refusals. Runs where vLLM is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.registry import MultiModalRegistry
from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

from benchmarks.untrained import qwen3_vl
from benchmarks.vllm import QUESTIONS, UNSTEADY, embeddings
from trio import zoo
from trio.batch import LocalEngine, RowAnswerer, open_rows
from trio.core.images import inputs_for, load_image, prompt_for
from trio.encoders import compress
from trio.errors import TrioError, UnsupportedModelError
from trio.integrations.vllm.jobs import VllmEngine
from trio.integrations.vllm.qwen_vl import QwenModel
from trio.integrations.vllm.seams import missing_seam
from trio.pipeline import Pipeline
from trio.testing.engines.__main__ import main
from trio.testing.engines.prompts import reference, requests
from trio.testing.engines.results import EngineParity
from trio.testing.engines.vllm import CASES, NEW_TOKENS, run_case

IMAGE = load_image(zoo.demo_image())
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32}


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl"])
def test_the_engine_answers_as_transformers_does(name, tmp_path):
    out = tmp_path / "result.json"
    questions = [f"--question={one}" for one in QUESTIONS]
    code = main(["vllm", str(zoo.path(name)), "--quick", f"--image={zoo.demo_image()}", *questions, f"--out={out}"])
    result = EngineParity.from_json(out.read_text(encoding="utf-8"))
    assert code == 0 and result.passed and len(result.cases) == 2
    for case in result.cases:
        assert case.requests == 28 and case.images == case.same_tokens == 28 and case.difference < 1e-4
    assert result.cases[0].cached > 100  # the second round found prompts in the prefix cache


def test_qwen3_with_features_for_later_layers_answers_as_transformers_does(tmp_path):
    qwen3_vl(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    asked = requests(IMAGE, QUESTIONS, without=[UNSTEADY])
    ends = frozenset([model.generation_config.eos_token_id])
    spec = {"compressor": {"name": "divprune", "keep": 16}, "positions": "auto"}
    expected = reference(model, processor, asked, spec, NEW_TOKENS, ends)
    (chunked,) = (case for case in CASES if "max_num_batched_tokens" in case.options)
    case = run_case(chunked, tmp_path, processor, asked, expected, "divprune-16", ends)
    assert case.passed and case.images == case.same_tokens == 26 and case.difference < 1e-4


def test_stock_vllm_answers_from_exported_embeddings():
    found = embeddings("tiny-llava-next")
    assert found and all(case.passed and case.images for case in found)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    one = LLM(str(zoo.path("tiny-llava")), hf_overrides={"trio": "divprune-16"}, **OPTIONS)
    yield one
    one.llm_engine.engine_core.shutdown()


def ask(engine: Any, image: Any = IMAGE, *, uuid: str | None = None, **options: Any) -> tuple[int, list[list[int]]]:
    """The length of the prompt, and what the images kept that were encoded for it."""
    before = engine.apply_model(lambda model: len(model.trio_indices))[0]
    _, processor = zoo.load("tiny-llava")
    prompt: dict[str, Any] = {"prompt": prompt_for(processor, 1, QUESTIONS[0]), "multi_modal_data": {"image": image}}
    if options:
        prompt["mm_processor_kwargs"] = options
    if uuid is not None:
        prompt["multi_modal_uuids"] = {"image": [uuid]}
    (out,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    kept = engine.apply_model(lambda model: [one.tolist() for one in model.trio_indices])[0]
    return len(out.prompt_token_ids), kept[before:]


def test_two_specs_on_one_image_never_share_and_one_does(engine):
    text = 13
    length, kept = ask(engine)
    assert length == text + 16 and len(kept) == 1 and len(kept[0]) == 16
    assert ask(engine) == (text + 16, [])  # found
    same = {"compressor": {"name": "divprune", "keep": 16}, "positions": "auto"}
    assert ask(engine, trio=same) == (text + 16, [])  # the engine's spec in other words
    length, kept = ask(engine, trio="uniform-grid-16")
    assert length == text + 16 and len(kept) == 1
    assert ask(engine, trio="uniform-grid-16") == (text + 16, [])
    assert ask(engine, trio="divprune-17")[0] == text + 17
    assert ask(engine, trio="none") == (text + 144, [])
    assert ask(engine) == (text + 16, [])


def test_one_name_of_an_image_under_two_specs_is_two_items(engine):
    image = IMAGE.rotate(90)
    first = ask(engine, image, uuid="mine", trio="divprune-9")
    second = ask(engine, image, uuid="mine", trio="average-pool-9")
    default = ask(engine, image, uuid="mine")
    assert len(first[1]) == len(second[1]) == len(default[1]) == 1
    assert len({tuple(one[1][0]) for one in (first, second, default)}) == 3
    assert ask(engine, image, uuid="mine", trio="divprune-9") == (first[0], [])


def test_random_tokens_are_those_of_the_pixels(engine):
    spec = {"name": "random", "keep": 10, "seed": 5}
    _, kept = ask(engine, IMAGE.rotate(180), trio={"compressor": spec, "positions": "auto"})
    model, processor = zoo.load("tiny-llava")
    with torch.no_grad():
        (expected,) = compress(model, inputs_for(processor, [IMAGE.rotate(180)], "?")["pixel_values"], spec)
    assert kept == [expected.token_index.tolist()]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("trio-11", "inside the language model"),
        ("random-16", "no seed is written"),
        ("tome-16", "was not tested in this engine"),
        ({"compressor": {"name": "prumerge", "share": 0.1}, "positions": "auto"}, "loads the first 4 of 5 blocks"),
        ({"compressor": {"name": "divprune", "keep": 16}}, "positions: found 'original'"),
        ("divprun-16", "no shipped spec"),
    ],
)
def test_requests_are_refused_before_they_run_and_the_engine_goes_on(engine, spec, match):
    with pytest.raises(TrioError, match=match):
        ask(engine, trio=spec)
    assert ask(engine)[0] == 29


def test_the_tower_is_read_and_left_as_it_was(engine):
    def hooks(model: Any) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = engine.apply_model(hooks)[0]
    image = IMAGE.rotate(270)
    length, kept = ask(engine, image, trio="visionzip-16")
    assert length == 29 and len(kept[0]) == 16 and engine.apply_model(hooks)[0] == before
    assert ask(engine, image, trio="visionzip-16") == (29, [])
    assert ask(engine, image, trio="vispruner-16")[1] != [kept[0]]


def test_a_job_gives_what_it_gives_on_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    scenes = [IMAGE, IMAGE.rotate(90), IMAGE.resize((90, 200)), IMAGE.rotate(180)]
    lines = []
    for number, scene in enumerate(scenes):
        scene.save(tmp_path / f"{number}.png")
        lines += [{"id": f"{number}{part}", "image": f"{number}.png", "question": part} for part in QUESTIONS]
    (tmp_path / "3.png").write_bytes(b"no image")
    lines.append({"id": "long", "image": "0.png", "question": "what " * 2000})  # more than the engine takes
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)))
    spec = {"name": "mine", "compressor": {"name": "visionzip", "keep": 16}, "positions": "compact"}
    model, processor = zoo.load("tiny-llava", dtype="float32")
    answerer = RowAnswerer(model, processor, Pipeline.from_spec(spec, model), max_new_tokens=8)
    expected = list(LocalEngine(answerer, 4).answers(open_rows(table), set()))
    job = VllmEngine("tiny-llava", spec, 4, 8, options={"max_model_len": 1024, "block_size": 32})
    found = list(job.answers(open_rows(table), {expected[1].id}))
    assert found[:-1] == [one for one in expected[:-1] if one.id != expected[1].id]
    assert [one.error is None for one in found] == [True] * 5 + [False] * 3 and found[-1].id == "long"
    assert {(one.visual_tokens, one.kept) for one in found[:5]} == {(144, 16.0)}


def test_an_engine_does_not_start_with_a_spec_that_cannot_work():
    with pytest.raises(TrioError, match="inside the language model"):
        LLM(str(zoo.path("tiny-llava")), hf_overrides={"trio": "trio-11"}, **OPTIONS)


class _Other(MultiModalRegistry):
    """vLLM's registry, for a model that the plugin has no class for."""

    def _get_model_cls(self, model_config: Any) -> Any:
        processor = SimpleNamespace(apply=lambda inputs, timing_ctx: "whole images")
        return SimpleNamespace(_processor_factory=SimpleNamespace(build_processor=lambda ctx: processor))

    def _create_processing_ctx(self, model_config: Any, tokenizer: Any = None) -> Any:
        return None


def test_untested_architectures_are_refused_by_name(engine):
    def config(**extra: Any) -> Any:
        named = SimpleNamespace(architectures=["InternVLForConditionalGeneration"], **extra)
        return SimpleNamespace(hf_config=named, is_multimodal_model=True)

    with pytest.raises(
        UnsupportedModelError, match="found InternVLForConditionalGeneration; the plugin was tested with"
    ):
        _Other().create_processor(config(trio="divprune-16"))
    processor = _Other().create_processor(config())
    assert processor.apply(SimpleNamespace(hf_processor_mm_kwargs={}), None) == "whole images"
    with pytest.raises(UnsupportedModelError, match="Leave 'trio' out of mm_processor_kwargs"):
        processor.apply(SimpleNamespace(hf_processor_mm_kwargs={"trio": "divprune-16"}), None)


def test_no_graph_encodes_images():
    class Stock:
        def get_encoder_cudagraph_config(self) -> Any:
            return EncoderCudaGraphConfig(modalities=["image", "video"], buffer_keys=[], out_hidden_size=8)

    class Model(QwenModel, Stock):
        def __init__(self) -> None:
            pass

    assert Model().get_encoder_cudagraph_config().modalities == ["video"]


def test_missing_seams_and_other_versions_are_named(monkeypatch):
    assert missing_seam() is None
    with monkeypatch.context() as patch:
        patch.setattr(BaseMultiModalProcessor, "_call_hf_processor", lambda self, text, images: None)
        assert missing_seam().endswith("does not take hf_data, hf_kwargs")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.40.1")
        assert missing_seam() == "found vLLM 0.40.1; the plugin was tested with versions from 0.32 to below 0.33"
