"""The plugin's parts that need no lmms-eval: arguments, conversations, options, batches, answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

import trio
from trio import zoo
from trio.integrations.lmms_eval.answering import ConversationAnswerer
from trio.integrations.lmms_eval.requests import batches, conversation, cut, generation, squared
from trio.integrations.lmms_eval.settings import Settings, check_processor, load, place

RED = Image.new("RGB", (4, 2), (255, 0, 0))
BLUE = Image.new("RGB", (2, 2), (0, 0, 255))


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return [{"role": "user", "content": content}]


# Arguments


def test_arguments_become_settings() -> None:
    made = Settings.from_arguments({"pretrained": "tiny-llava", "spec": "none", "batch_size": "4", "max_pixels": 99})
    assert made == Settings("tiny-llava", None, batch_size=4, max_pixels=99)
    assert Settings.from_arguments({"pretrained": "a/b", "spec": "trio-11"}).spec == "trio-11"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"pretrain": "x"}, "unknown argument 'pretrain'. Did you mean 'pretrained'"),
        ({"pretrained": ""}, "`pretrained` is missing"),
        ({"spec": ""}, "`spec` is missing"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_pixels": True}, "max_pixels is True"),
        ({"pad_to_square": "yes"}, "give True or False"),
        ({"dtype": "int4"}, "one of auto, float32"),
        ({"device": "cpu", "device_map": "auto"}, "contradict"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(trio.TrioError, match=match):
        Settings.from_arguments({"pretrained": "tiny-llava", "spec": "none"} | changed)


def test_a_device_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("tiny-llava", None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert place(settings) == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert place(settings) == "cuda:1"
    with pytest.raises(trio.TrioError, match="2 processes"):
        place(Settings("tiny-llava", None, device_map="auto"))


def test_a_model_that_cannot_be_loaded() -> None:
    with pytest.raises(trio.TrioError, match="no-such-attention"):
        load(Settings("tiny-llava", None, device="cpu", attn_implementation="no-such-attention"))
    with pytest.raises(trio.TrioError, match="neither a model of the zoo"):
        load(Settings("tiny-lava", None))


def test_pixel_limits_are_for_processors_that_have_them() -> None:
    settings = Settings("a/b", None, max_pixels=28 * 28 * 100)
    _, processor = zoo.load("tiny-llava")
    with pytest.raises(trio.TrioError, match="max_pixels means nothing"):
        check_processor(settings, processor, {"max_pixels": settings.max_pixels or 0})
    processor.image_processor = Qwen2VLImageProcessor(max_pixels=settings.max_pixels)
    check_processor(settings, processor, {"max_pixels": settings.max_pixels or 0})
    rows, columns = processor.image_processor(Image.new("RGB", (2000, 2000)))["image_grid_thw"][0][1:]
    assert rows * columns * 14 * 14 <= 28 * 28 * 100
    processor.chat_template = None
    with pytest.raises(trio.TrioError, match="no chat template"):
        check_processor(settings, processor, {})


# Conversations


def test_messages_for_the_chat_template(tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.png")
    made = conversation(user(RED, tmp_path / "blue.png", "which?"), system_prompt="Be brief.")
    assert made.images == 2
    assert [message["role"] for message in made.messages] == ["system", "user"]
    first, second, text = made.messages[1]["content"]
    assert first["image"].getpixel((0, 0)) == (255, 0, 0)
    assert second["image"].getpixel((0, 0)) == (0, 0, 255)
    assert text == {"type": "text", "text": "which?"}
    assert conversation([{"role": "user", "content": "plain"}]).messages == user("plain")
    own = [{"role": "system", "content": "Mine."}, *user("hello")]
    assert conversation(own, system_prompt="Yours.").messages[0]["content"][0]["text"] == "Mine."


def test_images_stand_at_their_placeholders() -> None:
    parts = conversation(user(RED, BLUE, "<image> or <image>?"), placeholder="<image>").messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text", "image", "text"]
    assert parts[2]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert [part["text"] for part in parts if part["type"] == "text"] == [" or ", "?"]
    with pytest.raises(trio.TrioError, match="2 times, but its message has 1"):
        conversation(user(RED, "<image> or <image>?"), placeholder="<image>")


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(trio.TrioError, match="'video'"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    with pytest.raises(trio.TrioError, match="comes as int"):
        conversation(user(3))


def test_squares() -> None:
    made = squared(RED, (1, 2, 3))
    assert made.size == (4, 4)
    assert [made.getpixel((0, y)) for y in range(4)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]
    assert conversation(user(RED, "?"), square=(0, 0, 0)).messages[0]["content"][0]["image"].size == (4, 4)


# Options


def test_greedy_options() -> None:
    options, until = generation({"temperature": 0, "top_p": 1.0, "until": ["\n\n", ""]}, max_new_tokens=7)
    assert options == {
        "max_new_tokens": 7, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1,
    }  # fmt: skip
    assert until == ("\n\n",)
    assert generation({"until": "x", "max_gen_toks": 3}, max_new_tokens=7)[0]["max_new_tokens"] == 3


def test_sampling_options() -> None:
    options, until = generation({"temperature": 0.7, "top_p": 0.9, "until": None}, max_new_tokens=7)
    assert (options["do_sample"], options["temperature"], options["top_p"], until) == (True, 0.7, 0.9, ())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"image_aspect_ratio": "pad"}, "no such option"),
        ({"num_return_sequences": 2}, "one answer"),
        ({"until": 3}, "a list of strings"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(trio.TrioError, match=match):
        generation(given, max_new_tokens=7)


def test_answers_are_cut_at_the_first_end() -> None:
    assert cut("yes. No\n", ("\n", ".")) == "yes"
    assert cut("yes", ("\n",)) == "yes"
    assert cut("yes", ()) == "yes"


def test_batches_share_their_options() -> None:
    greedy, sampled = {"until": ["a"], "temperature": 0}, {"temperature": 1}
    requests = [("a", greedy), ("bbb", sampled), ("cc", dict(reversed(greedy.items()))), ("ddd", greedy)]
    assert batches(requests, 2) == [[3, 2], [0], [1]]
    assert batches([], 2) == []


# Answers


@pytest.mark.parametrize("spec", [None, "trio-11", "visionzip-llava-1.5-64"])
def test_a_mixed_batch_answers_as_singles_do(spec: str | None) -> None:
    model, processor = zoo.load("tiny-llava", dtype="float32")
    pipeline = None if spec is None else trio.Pipeline.from_spec(spec, model)
    answerer = ConversationAnswerer(model, processor, pipeline)
    image = Image.open(zoo.demo_image())
    prompts = [
        conversation(user(*images, text))
        for images, text in (((image,), zoo.demo_question()), ((), "what colour ?"), ((image, image), "how ?"))
    ]
    options, until = generation({"num_beams": 2, "max_new_tokens": 4}, max_new_tokens=4)
    together = answerer.answer(prompts, options, until)
    assert [answer.text for answer in together] == [answerer.answer([p], options, until)[0].text for p in prompts]
    assert all(1 <= answer.tokens <= 4 for answer in together)
    if spec is None:
        assert all(answer.visual == answer.kept == 0 for answer in together)
    else:
        assert [answer.visual for answer in together] == [144, 0, 288]
        assert together[2].kept == pytest.approx(2 * together[0].kept)
        assert together[0].kept == {"trio-11": 16, "visionzip-llava-1.5-64": 64}[spec]


def test_nothing_of_lmms_eval_is_imported_before_it_asks() -> None:
    code = "import sys, trio.integrations.lmms_eval; print([m for m in ('lmms_eval', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
