"""Training: packed branches are what generation sees, and a run that was cut off goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lab.training.export import export
from lab.training.language import Branches, dense_share, train_language
from lab.training.loop import Clock
from lab.training.packing import CHUNK, NAME, local_mask
from lab.training.recipes import RECIPES, Recipe, build_model
from lab.training.tower import IGNORE, dense_labels, train_tower
from lab.training.vocabulary import build_tokenizer
from trio import zoo
from trio.measure.shapesvqa.scenes import draw_scene

SMALL = Recipe(name="small", tower_width=32, tower_layers=3, width=32, heads=2, layers=2)


@pytest.fixture(scope="module")
def row() -> dict[str, torch.Tensor]:
    return Branches(RECIPES["tiny-llava"], build_tokenizer(), 0, 0, 9 * CHUNK, torch.tensor([0.3]))[3]


def test_a_row_holds_questions_and_supervises_only_answers(row: dict[str, torch.Tensor]) -> None:
    tokenizer = build_tokenizer()
    assert int(row["branch"].max()) > 15
    for number in range(1, int(row["branch"].max()) + 1):
        mine = row["branch"] == number
        asked, answered = tokenizer.decode(row["ids"][mine]), row["wanted"][mine]
        answer = answered[answered != IGNORE]
        assert "assistant :" in asked and answer[-1] == tokenizer.eos_token_id
        assert asked.endswith(tokenizer.decode(answer[:-1]))
        assert row["place"][mine].tolist() == list(range(int(mine.sum())))


def test_packed_attention_equals_each_question_alone(row: dict[str, torch.Tensor]) -> None:
    language = zoo.load("tiny-llava")[0].model.language_model
    prefix = torch.randn(1, 40, language.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ids, branch = row["ids"][None], row["branch"][None]
    embeds = torch.cat([prefix, language.embed_tokens(ids)], 1)
    places = torch.cat([torch.arange(40)[None], 40 + row["place"][None]], 1)
    with torch.no_grad():
        language.set_attn_implementation(NAME)
        mask = local_mask(torch.where(branch > 0, branch, -1))
        packed = language(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
        language.set_attn_implementation("sdpa")
        for number in range(1, int(branch.max()) + 1):
            mine = torch.cat([torch.ones(40, dtype=torch.bool), branch[0] == number])
            alone = language(inputs_embeds=embeds[:, mine], use_cache=False).last_hidden_state
            assert torch.allclose(packed.last_hidden_state[:, mine], alone, atol=1e-4)


def test_dense_labels_say_what_is_drawn() -> None:
    scene = draw_scene("train", 0, 4)
    labels = dense_labels(scene, 14)
    assert labels["centre"].sum() == len(scene.items)
    assert (labels["glyph"] > 0).any() == bool(scene.plates)
    assert ((labels["shape"] > 0) == (labels["colour"] > 0)).all()
    assert labels["row"][:, 0].tolist() == list(range(12))


def test_exercises_fade() -> None:
    shares = [dense_share(p / 10) for p in range(11)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 and shares[-1] == 0.1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="training needs torch.optim.Muon (torch 2.9)")
def test_training_resumes_and_exports(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()

    def run(steps: int, resume: bool) -> tuple[Any, int]:
        torch.manual_seed(0)
        model = build_model(SMALL, tokenizer)
        clock = Clock(None, steps)
        train_tower(SMALL, model, tmp_path, 0, clock, resume, batch_size=2, fresh=4)
        clock = Clock(None, steps)
        train_language(
            SMALL, model, tokenizer, tmp_path, 0, clock, resume, batch_size=2, room=3 * CHUNK, projector_steps=2
        )
        return model, clock.step

    assert run(2, resume=False)[1] == 2
    before = torch.load(tmp_path / "language.pt", weights_only=True)
    model, steps = run(2, resume=True)  # nothing is left to do: the same model
    assert steps == 2
    assert torch.equal(model.lm_head.weight, before["head"]["weight"])
    assert run(3, resume=True)[1] == 3

    export(SMALL, tmp_path, tmp_path / "model")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32 and zoo.load_folder(tmp_path / "model")
