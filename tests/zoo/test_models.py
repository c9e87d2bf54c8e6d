"""The models of the zoo: stock classes, loadable offline by stock means, and able to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from lab.training.evaluate import answers, answers_by_scene, any_size, blank, main, prompt, summary
from trio import zoo
from trio.errors import UnknownNameError
from trio.measure.shapesvqa.examples import examples
from trio.measure.statistics import Bootstrap, proportion
from trio.zoo.find import find_model

SLOTS = 144


CLASSES = {
    "tiny-llava": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "tiny-llava-seed1": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "tiny-llava-early": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "tiny-llava-late": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "tiny-llava-next": ("LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
    "tiny-qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return zoo.load("tiny-llava")


@pytest.fixture(scope="module", params=zoo.names())
def each(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Every model of the zoo."""
    return zoo.load(request.param)


def test_names_and_paths() -> None:
    assert set(zoo.names()) == {"tiny-llava", *zoo.SEPARATE} == set(CLASSES)
    for name in zoo.names():
        assert zoo.path(name).name == name and (zoo.path(name) / "model.safetensors").is_file()
        assert find_model(name) == str(zoo.path(name))


def test_a_model_of_the_other_distribution_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trio_vlm_zoo", None)  # as if it were not installed
    assert zoo.names() == ["tiny-llava"]
    for name in zoo.SEPARATE:
        for asked in (zoo.path, find_model, zoo.load):
            with pytest.raises(UnknownNameError, match=f"{name}.*distribution trio-vlm-zoo.*pip install trio-vlm-zoo"):
                asked(name)
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny-llava-next'"):
        zoo.path("tiny-llava-nxt")


def test_a_broken_distribution_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trio_vlm_zoo.py").write_text("import no_such_module")
    monkeypatch.delitem(sys.modules, "trio_vlm_zoo", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        zoo.names()


def test_a_folder_of_that_name_comes_before_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trio_vlm_zoo", None)
    monkeypatch.chdir(tmp_path)
    Path("tiny-llava-next").mkdir()
    Path("tiny-llava-next/config.json").write_text("{}")
    assert find_model("tiny-llava-next") == "tiny-llava-next"


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="tiny-llava"):
        zoo.load("tiny-lava")


def test_the_import_is_light() -> None:
    code = "import sys, trio.zoo; trio.zoo.names(); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_takes_at_most_12_megabytes() -> None:
    for name in zoo.names():
        assert sum(file.stat().st_size for file in zoo.path(name).iterdir()) <= 12_000_000


@pytest.mark.parametrize("name", zoo.names())
def test_stock_loaders_give_stock_classes_without_a_network(name: str) -> None:
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
from trio import zoo
model, processor = zoo.load({name!r})
print(type(model).__name__, type(processor).__name__, model.dtype, model.training)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    ).stdout
    assert out.split() == [*CLASSES[name], "torch.float32", "False"]


def test_the_folder_is_all_that_is_needed(loaded: tuple[Any, Any]) -> None:
    folder = zoo.path("tiny-llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(model) is LlavaForConditionalGeneration and model.dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(folder)) is LlavaProcessor
    assert len(model.model.language_model.layers) == 8


@pytest.mark.parametrize(
    "text,tokens",
    [
        ("What COLOR is the circle?", ["what", "colour", "is", "the", "circle", "?"]),
        ("how many crosses, stars", ["how", "many", "cross", "##es", ",", "star", "##s"]),
        ("number: 42!", ["number", ":", "4", "##2", "!"]),
        ("zebra (left)", ["<unk>", "<unk>", "left", "<unk>"]),
    ],
)
def test_words(loaded: tuple[Any, Any], text: str, tokens: list[str]) -> None:
    assert loaded[1].tokenizer.tokenize(text) == tokens


@pytest.mark.parametrize("text", ["yes", "42", "top left", "90", "none", "circle", "how many crosses are there"])
def test_round_trip(loaded: tuple[Any, Any], text: str) -> None:
    tokenizer = loaded[1].tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_every_question_and_answer_has_its_words(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    for example in examples("test", 5, 60):
        assert tokenizer.unk_token_id not in tokenizer(f"{example.question} {example.answer}").input_ids


def test_the_prompt_is_the_one_trained_on(loaded: tuple[Any, Any]) -> None:
    processor = loaded[1]
    assert prompt(processor, "is it red?") == "user : <image> is it red? assistant :"
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": zoo.demo_image().as_posix()},
                {"type": "text", "text": "is it red?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == SLOTS
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1 and ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_padding_sides(loaded: tuple[Any, Any], side: str) -> None:
    model, processor = loaded
    texts = [prompt(processor, q) for q in ("what is the number?", "on which side of the red star is the blue circle?")]
    image = Image.open(zoo.demo_image()).convert("RGB")
    batch = processor(images=[image, image], text=texts, padding=True, padding_side=side, return_tensors="pt")
    mask = batch["attention_mask"]
    assert mask[0, 0 if side == "left" else -1] == 0 and mask[1].all()
    single = processor(images=image, text=texts[0], return_tensors="pt")
    with torch.no_grad():
        last = -1 if side == "left" else int(mask[0].sum()) - 1
        assert torch.allclose(model(**batch).logits[0, last], model(**single).logits[0, -1], atol=1e-3)


def test_it_sees(each: tuple[Any, Any]) -> None:
    """A model that ignores the image scores under 40% on these."""
    model, processor = each
    asked = examples("test", 11, 9, varied=any_size(model))
    assert len(asked) >= 55
    ask = answers_by_scene if model.config.model_type.startswith("llava") else answers  # the same, sooner
    seen, unseen = (ask(model, processor, part) for part in (asked, blank(asked)))
    right = sum(text == example.answer for text, example in zip(seen, asked, strict=True))
    guessed = sum(text == example.answer for text, example in zip(unseen, asked, strict=True))
    assert right >= 0.7 * len(asked) and right - guessed >= 0.25 * len(asked)


def test_it_stops_after_the_answer(each: tuple[Any, Any]) -> None:
    given = answers(*each, examples("test", 12, 2, varied=any_size(each[0])), max_new_tokens=12)
    assert all(0 < len(text.split()) <= 2 for text in given)


@pytest.mark.parametrize("name", [name for name in zoo.names() if "llava" in name])
def test_one_cache_for_all_questions_of_a_scene_gives_the_same_answers(name: str) -> None:
    model, processor = zoo.load(name)
    asked = examples("test", 13, 2, varied=any_size(model))
    asked += blank(asked[-3:])
    assert answers_by_scene(model, processor, asked) == answers(model, processor, asked)


def test_the_demo(loaded: tuple[Any, Any]) -> None:
    with Image.open(zoo.demo_image()) as image:
        assert image.size == (168, 168)
    assert zoo.demo_question().endswith("?")


def test_examples_are_a_prefix_of_more_examples() -> None:
    few, more = examples("test", 0, 5), examples("test", 0, 9)
    assert [(e.question, e.answer) for e in few] == [(e.question, e.answer) for e in more[: len(few)]]


def test_intervals() -> None:
    found = proportion(50, 100)
    assert (round(found.low, 3), round(found.high, 3)) == (0.404, 0.596)
    assert (proportion(0, 0).low, proportion(0, 0).high) == (0.0, 1.0)
    draws = Bootstrap([i // 4 for i in range(400)], one_by_one=True)
    narrow = draws.number([float(i % 2 == 0) for i in range(400)])  # every scene has the same mean
    wide = draws.number([float(i // 4 % 2 == 0) for i in range(400)])  # scenes are all right or all wrong
    assert (narrow.low, narrow.high) == (0.5, 0.5) and wide.high - wide.low > 0.15
    asked = examples("test", 0, 3)
    assert summary(asked, [True] * len(asked))["overall"]["accuracy"] == 1.0


def test_the_folder_names_no_machine() -> None:
    for name in zoo.names():
        for file in Path(zoo.path(name)).glob("*.json"):
            assert "/tmp" not in file.read_text() and "/work" not in file.read_text()


def test_the_evaluation_prints_json_and_writes_it_where_asked(tmp_path, capsys):
    main("tiny-llava", scenes=1, as_json=True, out=tmp_path / "numbers.json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "numbers.json").read_text())
    assert printed["scenes"] == 1 and printed["full"].keys() == printed["blank"].keys()
    assert 0 < printed["full"]["overall"]["questions"] == printed["blank"]["overall"]["questions"]
    main("tiny-llava", scenes=1)
    assert "full: with the image" in capsys.readouterr().out
